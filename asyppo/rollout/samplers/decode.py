"""A decoding loop over a cache of keys and values, for models that keep nothing else of the tokens they have read.

Each prompt is read once, and its cache repeated for its responses. Rows that have ended leave batch and cache, and
waiting prompts take their places. Rows are aligned on the right: the last column of the cache is the newest token of
every row, and what a shorter row has on its left is masked.
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
from asyppo.rollout.samplers.one_token import OneTokenPass, why_not_by_token


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
        model = self.weights.current()
        ends = torch.tensor(self.eos_token_ids, dtype=torch.int64, device=model.device)
        tokens = torch.zeros(len(prompts), max_completion_length, dtype=torch.int64, device=model.device)
        logprob = torch.zeros(tokens.shape, device=model.device)
        age = torch.zeros(len(prompts), dtype=torch.int64)  # tokens drawn of each response
        ended = torch.zeros(len(prompts), dtype=torch.bool)
        # Prompts of like length go together, so that padding is small, and equal ones are neighbours.
        waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i].tolist()))
        rows: _Rows | None = None
        with evaluating(model):
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
                at = of.to(model.device), age[of].to(model.device)
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
        width = rows.cache.get_seq_length() + 1
        seen = None
        if int(rows.length.min()) < width:
            seen = (torch.arange(width) >= (width - rows.length)[:, None]).to(tokens.device)
        position = (rows.length - 1).to(tokens.device)
        rows.logits = self.one_token(tokens, position, seen, rows.cache.layers)

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
    """Keys and values [b, heads, columns, width] of a layer: views of buffers that have room for the next tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to keys and values, and return all of them."""
        if not self.is_initialized:
            self.hold(key_states, value_states, key_states.shape[2])
            return self.keys, self.values
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self.buffers[0].shape[2]:
            everyone = torch.arange(len(key_states), device=key_states.device)
            self.hold(_aligned([(self.keys, everyone)], start), _aligned([(self.values, everyone)], start), start)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.hold(*self.buffers, end)
        return self.keys, self.values

    def hold(self, keys: Tensor, values: Tensor, columns: int) -> None:
        """Take these buffers, of which the first ``columns`` are in use."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.buffers = keys, values
        self.keys, self.values = keys[:, :, :columns], values[:, :, :columns]


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
    width, layers = int(length.max()), []
    for _ in range(len(parts[0][0].cache.layers)):
        old = [rows.cache.layers.pop(0) for rows, _, _ in parts]
        keys = _aligned([(layer.keys, chosen) for layer, chosen in zip(old, on_device, strict=True)], width)
        values = _aligned([(layer.values, chosen) for layer, chosen in zip(old, on_device, strict=True)], width)
        layers.append(_Layer())
        layers[-1].hold(keys, values, width)
    return _Rows(torch.cat([responses for _, _, responses in parts]), length, logits, _cache(layers))


def _aligned(parts: Sequence[tuple[Tensor, Tensor]], width: int) -> Tensor:
    """Return the chosen rows (int64 [b]) of tensors [n, heads, columns, d] one under another, with their last columns
    at ``width``, zeros on the left of what is shorter, and room on the right."""
    first, count = parts[0][0], sum(len(chosen) for _, chosen in parts)
    aligned = first.new_zeros(count, first.shape[1], width + max(ROOM, width // 16), first.shape[3])
    start = 0
    for tensor, chosen in parts:
        end, columns = start + len(chosen), min(tensor.shape[2], width)
        aligned[start:end, :, width - columns : width] = tensor[chosen, :, tensor.shape[2] - columns :]
        start = end
    return aligned
