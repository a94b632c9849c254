"""A decoding loop over a cache of keys and values, for models that keep nothing else of the tokens they have read.

Each prompt is read once, and its cache repeated for its responses, or, on a CPU and where the pass over one token is
our own, kept once beside what is theirs. Rows that have ended leave batch and cache, and waiting prompts take their
places. Rows are aligned on the right: the last column of the cache is the newest token of every row, and what a shorter
row has on its left is masked.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from asyppo.rollout.samplers.base import ModelSampler, Response, cut_at_the_end, evaluating
from asyppo.rollout.samplers.draw import draw
from asyppo.rollout.samplers.one_token import OneTokenPass, Prompts, why_not_by_token


@dataclass(eq=False, repr=False, kw_only=True)
class DecodingSampler(ModelSampler):
    """``Sampler`` that decodes with the model's key-value cache, as ``generate`` does, but reads each prompt once and
    drops rows that have ended.

    Randomness comes from torch's global generator; the whole softmax is sampled from, whatever settings a checkpoint
    brings along.
    """

    max_tokens: int = 16_384
    """Most tokens of prompts that are read at once."""

    @torch.no_grad()
    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """Return one response for each prompt (int64 [length]). Raises RuntimeError where the model's cache is of
        another kind."""
        device = self.model.device
        ends = torch.tensor(self.eos_token_ids, dtype=torch.int64, device=device)
        tokens = torch.zeros(len(prompts), max_completion_length, dtype=torch.int64, device=device)
        logprob = torch.zeros(tokens.shape, device=device)
        age = torch.zeros(len(prompts), dtype=torch.int64)  # tokens drawn of each response
        ended = torch.zeros(len(prompts), dtype=torch.bool)
        # Prompts of like length go together, so that padding is small, and equal ones are neighbours.
        waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i].tolist()))
        rows: _Rows | None = None
        with self.weights.current() as model, evaluating(model):
            reader = _Reader(model, self.pad_token_id, self.max_tokens)
            while waiting or rows is not None:
                free = self.batch_size - (0 if rows is None else len(rows.response))
                if waiting and (rows is None or 4 * free >= self.batch_size):
                    chosen, waiting = waiting[:free], waiting[free:]
                    under_way = [] if rows is None else [(rows, torch.arange(len(rows.response)), rows.response)]
                    rows = _gathered([*under_way, *reader.read([prompts[i] for i in chosen], chosen)])
                assert rows is not None
                drawn, drawn_logprob = draw(rows.logits, temperature)
                of = rows.response
                at = of.to(device), age[of].to(device)
                tokens[at], logprob[at] = drawn, drawn_logprob
                age[of] += 1
                ended[of] |= torch.isin(drawn, ends).cpu()
                full = age[of] == max_completion_length
                over = ended[of] | full
                # Dropping copies what stays, so it waits for an eighth of the rows. What those that have ended draw
                # until then is cut off.
                if full.any() or 8 * int(over.sum()) >= len(over):
                    stay = (~over).nonzero()[:, 0]
                    rows = _gathered([(rows, stay, of[stay])]) if len(stay) else None
                    drawn = drawn[stay.to(drawn.device)]
                if rows is not None:
                    reader.step(rows, drawn)
        return cut_at_the_end(tokens.cpu(), logprob.cpu(), self.eos_token_ids)


ROOM = 64
"""Columns that a cache has to spare, at least."""
ONCE = ("cpu",)
"""Where prompts are kept once. A GPU's attention reads one cache in one launch."""


def columns_of_cache(prompt: int, width: int) -> int:
    """Return how many a cache comes to in which sequences grow from ``prompt`` to ``width`` tokens."""
    columns = prompt
    while columns < width:
        columns += _room(columns)
    return columns


def _room(columns: int) -> int:
    """To spare behind so many columns."""
    return max(ROOM, columns // 16)


@dataclass
class _Rows:
    """b sequences under way."""

    response: Tensor
    """int64 [b]: the response that each is, on the CPU."""
    length: Tensor
    """int64 [b]: its tokens in the cache, on the CPU."""
    logits: Tensor
    """[b, V], of its next token."""
    cache: DynamicCache
    """Of all its tokens, or of those behind its prompt."""
    prompts: Prompts | None = None
    """None: the cache has them."""

    @property
    def own_length(self) -> Tensor:
        """int64 [b]: tokens in ``cache``, on the CPU."""
        return self.length if self.prompts is None else self.length - self.prompts.length[self.prompts.of]


class _Reader:
    """Passes of ``model`` over prompts and over the tokens that are drawn."""

    def __init__(self, model: PreTrainedModel, pad_token_id: int, max_tokens: int):
        self.model, self.pad_token_id, self.max_tokens = model, pad_token_id, max_tokens
        plain = (DynamicLayer, DynamicSlidingWindowLayer)
        self._check([type(layer) in plain for layer in DynamicCache(config=model.config).layers])
        self.accepted = inspect.signature(model.forward).parameters
        self.one_token = OneTokenPass(model) if why_not_by_token(model) is None else None

    def read(self, prompts: Sequence[Tensor], responses: Sequence[int]) -> list[tuple[_Rows, Tensor, Tensor]]:
        """Read ``prompts``, of which equal ones are neighbours, each once, and return what ``_gathered`` repeats: one
        row for each of ``responses``."""
        parts, start = [], 0
        while start < len(prompts):
            unique, repeats = [prompts[start]], [0]
            end = start
            for prompt in prompts[start:]:
                if not torch.equal(prompt, unique[-1]):
                    if len(prompt) * (len(unique) + 1) > self.max_tokens:
                        break
                    unique.append(prompt)
                    repeats.append(0)
                repeats[-1] += 1
                end += 1
            chosen = torch.arange(len(unique)).repeat_interleave(torch.tensor(repeats))
            parts.append((self._prompts(unique), chosen, torch.tensor(responses[start:end])))
            start = end
        return parts

    def _prompts(self, prompts: Sequence[Tensor]) -> _Rows:
        length = torch.tensor([len(prompt) for prompt in prompts])
        width = int(length.max())
        ids = torch.full((len(prompts), width), self.pad_token_id)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
        rows = _Rows(torch.arange(len(prompts)), length, torch.empty(0), _cache())
        self._forward(rows, ids.to(self.model.device))
        self._check([type(layer) is _Layer and layer.get_seq_length() == width for layer in rows.cache.layers])
        if self.one_token is not None and self.model.device.type in ONCE:
            rows.prompts = Prompts(rows.cache.layers, length, rows.response)
            rows.cache = _cache([layer.without_columns() for layer in rows.cache.layers])
        return rows

    def _check(self, layers: Sequence[bool]) -> None:
        """Raise RuntimeError unless there are ``layers``, and all are of the right kind."""
        if not layers or not all(layers):
            raise RuntimeError(f"{type(self.model).__name__} keeps other things of its tokens than a key and a value")

    def step(self, rows: _Rows, tokens: Tensor) -> None:
        """Let ``rows`` read the tokens (int64 [b]) that were drawn."""
        rows.length += 1
        if self.one_token is None:
            self._forward(rows, tokens[:, None])
            return
        prompts, columns = rows.prompts, torch.arange(rows.cache.get_seq_length() + 1)
        seen = columns >= (len(columns) - rows.own_length)[:, None]
        if prompts is not None:
            seen = torch.cat([prompts.seen, seen], dim=1)
        mask = None if bool(seen.all()) else seen.to(tokens.device)
        position = (rows.length - 1).to(tokens.device)
        rows.logits = self.one_token(tokens, position, mask, rows.cache.layers, prompts)

    def _forward(self, rows: _Rows, ids: Tensor) -> None:
        width = rows.cache.get_seq_length() + ids.shape[1]
        position = torch.arange(width) - (width - rows.length)[:, None]
        # Without padding there is no mask to be made, and none to be read in every layer.
        padded = int(rows.length.min()) < width
        options: dict[str, Any] = {"attention_mask": (position >= 0).long()} if padded else {}
        if "position_ids" in self.accepted:
            options["position_ids"] = position[:, -ids.shape[1] :].clamp(min=0)
        options = {name: value.to(ids.device) for name, value in options.items()}
        if "logits_to_keep" in self.accepted:
            options["logits_to_keep"] = 1
        output = self.model(input_ids=ids, past_key_values=rows.cache, use_cache=True, **options)
        rows.logits = output.logits[:, -1]


class _Layer(DynamicLayer):
    """Keys and values of a layer, ``both``, each [heads, b, columns, d]: views of buffers that have room for the next
    tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to keys and values [b, heads, columns, d], and return all of them."""
        new = key_states.transpose(0, 1), value_states.transpose(0, 1)
        if self.is_initialized:
            self.append(*new)
        else:
            self.lazy_initialization(key_states, value_states)
            self.hold(new, new[0].shape[2])
        self.keys, self.values = (x.transpose(0, 1) for x in self.both)
        return self.keys, self.values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append [heads, b, columns, d] each."""
        start, end = self.both[0].shape[2], self.both[0].shape[2] + keys.shape[2]
        if end > self.buffers[0].shape[2]:
            everyone = torch.arange(keys.shape[1], device=keys.device)
            self.hold([_aligned([(x, everyone)], start, _room(start)) for x in self.both], start)
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer[:, :, start:end] = states
        self.hold(self.buffers, end)

    def hold(self, buffers: Sequence[Tensor], columns: int) -> None:
        """Take these buffers, of keys and of values, of which the first ``columns`` are in use."""
        self.is_initialized, self.buffers = True, buffers
        self.both = [x[:, :, :columns] for x in buffers]

    def get_seq_length(self) -> int:
        """Return the columns in use."""
        return self.both[0].shape[2] if self.is_initialized else 0

    def without_columns(self) -> _Layer:
        """Return an empty layer for as many rows."""
        empty = _Layer()
        empty.hold([x[:, :, :0].clone() for x in self.both], 0)
        return empty


def _cache(layers: Sequence[_Layer] = ()) -> DynamicCache:
    """Return a cache whose layers are of the kind above, windows of attention or not: masks keep to those."""
    cache = DynamicCache()
    cache.layers, cache.layer_class_to_replicate = list(layers), _Layer
    return cache


def _gathered(parts: Sequence[tuple[_Rows, Tensor, Tensor]]) -> _Rows:
    """Return rows of several parts as one: of each the ``chosen`` rows (int64 [b]), which may be repeated, as the
    responses (int64 [b]) beside them. The parts' caches are taken apart on the way, so that one layer at a time is in
    memory twice."""
    length = torch.cat([rows.length[chosen] for rows, chosen, _ in parts])
    on_device = [chosen.to(rows.logits.device) for rows, chosen, _ in parts]
    logits = torch.cat([rows.logits[chosen] for (rows, _, _), chosen in zip(parts, on_device, strict=True)])
    own = int(torch.cat([rows.own_length[chosen] for rows, chosen, _ in parts]).max())
    cache = _taken([rows.cache.layers for rows, _, _ in parts], on_device, own, _room(own))
    prompts = _gathered_prompts([(rows.prompts, chosen) for rows, chosen, _ in parts if rows.prompts is not None])
    return _Rows(torch.cat([responses for _, _, responses in parts]), length, logits, _cache(cache), prompts)


def _gathered_prompts(parts: Sequence[tuple[Prompts, Tensor]]) -> Prompts | None:
    """Return the prompts of the chosen rows (int64 [b]) of several parts; None if there are none."""
    if not parts:
        return None
    chosen, places, count = [], [], 0
    for prompts, rows in parts:
        kept, place = prompts.of[rows].unique(return_inverse=True)
        chosen.append(kept)
        places.append(count + place)
        count += len(kept)
    of = torch.cat(places)
    if count * int(of.bincount().max()) > 4 * len(of):  # the grid would be padding for the most part
        chosen, of = [prompts.of[rows] for prompts, rows in parts], torch.arange(len(of))
    length = torch.cat([prompts.length[kept] for (prompts, _), kept in zip(parts, chosen, strict=True)])
    layers = _taken([prompts.layers for prompts, _ in parts], chosen, int(length.max()), room=0)
    return Prompts(layers, length, of)


def _taken(caches: Sequence[list[Any]], chosen: Sequence[Tensor], width: int, room: int) -> list[Any]:
    """Return the layers of several caches as those of one, of each the chosen rows: see ``_aligned``."""
    layers = []
    for _ in range(len(caches[0])):
        old = [cache.pop(0).both for cache in caches]
        layers.append(_Layer())
        both = [_aligned(list(zip(same, chosen, strict=True)), width, room) for same in zip(*old, strict=True)]
        layers[-1].hold(both, width)
    return layers


def _aligned(parts: Sequence[tuple[Tensor, Tensor]], width: int, room: int) -> Tensor:
    """Return the chosen rows (int64 [b]) of tensors [heads, n, columns, d] one under another, with their last columns
    at ``width``, zeros on the left of what is shorter, and ``room`` on the right."""
    first, count = parts[0][0], sum(len(chosen) for _, chosen in parts)
    aligned = first.new_zeros(first.shape[0], count, width + room, first.shape[3])
    start = 0
    for tensor, chosen in parts:
        end, columns = start + len(chosen), min(tensor.shape[2], width)
        aligned[:, start:end, width - columns : width] = tensor[:, chosen, tensor.shape[2] - columns :]
        start = end
    return aligned
