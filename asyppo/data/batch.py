"""A batch of responses, and how it is cut into pieces that fit in memory.

Two layouts meet here. Models see sequences: prompt and response of one sample side by side, padded on the right.
Everything of reinforcement learning (log-probs, values, rewards, masks) lives on the *response grid* [B, T]: entry
[b, t] belongs to token t of response b, and is False in ``mask`` past its end, and where an environment wrote it. What
a model computes for token t is read at the position that predicts it, one to the left. Lengths, not token ids, say what
is padding, so a padding token equal to the end-of-sequence token is no problem. Or sequences are packed: one behind the
other in one row, without padding; or they share their prompts: a prompt is in that row once, the responses to it behind
it.

Micro-batches are cut on the host, which knows the lengths: nothing is read back from the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from asyppo.algorithm.turns import Turns
from asyppo.data.sharing import SharedPrompts, lay_out
from asyppo.distributed.processes import divide_rows, from_main, rank

if TYPE_CHECKING:
    from asyppo.data.hidden import HiddenStates

T = TypeVar("T")

CPU_TOKENS = 832
"""Most tokens of a model's pass on a CPU, for each of its threads: more are hardly faster, and take memory."""


@dataclass
class Batch:
    """B prompts with one response each; the G responses of a prompt share its ``group`` number."""

    tokens: Tensor
    """int64 [B, S]: prompt, response, then padding."""
    prompt_length: Tensor
    """int64 [B]."""
    response_length: Tensor
    """int64 [B], at least 1; an end-of-sequence token counts."""
    group: Tensor
    """int64 [B]: which prompt of the step it answers."""
    reward: Tensor
    """float32 [B, T]: a response's score at its last token, and rewards of tokens at their own."""
    sampler_logprob: Tensor
    """float32 [B, T]: log-prob of each token as the sampler computed it."""
    truncated: Tensor
    """bool [B]: cut off by the length limit."""
    score: Tensor
    """float32 [B]: what the reward functions gave, whatever is added to ``reward`` later."""
    ignored: Tensor
    """bool [B]: no loss counts it."""
    policy_inputs: Tensor | None = None
    """float32 [B, T, F]: what critics read beside the tokens, at the position that predicts each; None: nothing."""
    hidden: HiddenStates | None = None
    """The policy's hidden states, where critics read them."""
    known_lengths: tuple[list[int], list[int]] | None = None
    """``prompt_length`` and ``response_length`` on the host; None: to be read from the device once they are needed."""
    policy_tokens: Tensor | None = None
    """bool [B, T]: the response tokens that the policy drew, where an environment wrote others; None: it drew all."""
    turns: Turns | None = None
    """Where an environment answered; None: nowhere."""

    @property
    def mask(self) -> Tensor:
        """bool [B, T]: True on response tokens, but for those of an environment."""
        if self.policy_tokens is not None:
            return self.policy_tokens
        steps = torch.arange(self.reward.shape[1], device=self.tokens.device)
        return steps < self.response_length[:, None]

    @property
    def learned(self) -> Tensor:
        """bool [B, T]: the response tokens that losses count."""
        return self.mask & ~self.ignored[:, None]

    @property
    def value_mask(self) -> Tensor:
        """bool [B, T]: where critics have a value: ``mask``, and the first token of each answer of an environment,
        whose value is that of the state after the policy's turn."""
        return self.mask if self.turns is None else self.mask | self.turns.after

    @property
    def valued(self) -> Tensor:
        """bool [B, T]: those among them that losses count."""
        return self.value_mask & ~self.ignored[:, None]

    @property
    def length(self) -> Tensor:
        """int64 [B]: tokens of prompt and response."""
        return self.prompt_length + self.response_length

    @cached_property
    def on_host(self) -> tuple[list[int], list[int]]:
        """Lengths of the prompts and of the responses."""
        if self.known_lengths is not None:
            return self.known_lengths
        prompt, response = torch.stack([self.prompt_length, self.response_length]).tolist()
        return prompt, response

    @cached_property
    def host_length(self) -> Tensor:
        """``length``, on the CPU."""
        return torch.tensor([p + r for p, r in zip(*self.on_host, strict=True)])

    @cached_property
    def prompt_number(self) -> list[int]:
        """Of each row, which of the different prompts it has. Reads the tokens: for batches on the CPU."""
        numbers: dict[bytes, int] = {}
        prompts = (row[:length].numpy().tobytes() for row, length in zip(self.tokens, self.on_host[0], strict=True))
        return [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]

    def __len__(self) -> int:
        return len(self.tokens)


def make_batch(
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    logprobs: Sequence[Tensor],
    scores: Sequence[float | Tensor],
    truncated: Sequence[bool],
    group: Sequence[int],
    *,
    pad_token_id: int,
    device: torch.device,
    policy_tokens: Sequence[Tensor] | None = None,
) -> Batch:
    """Lay B prompts and responses (int64 [length] each) out as a Batch on ``device``.

    A response's score is a number, or a reward for each of its tokens (float32 [length]). ``policy_tokens`` (bool
    [length] each, beginning with True) says which tokens are not of an environment; the reward of one of these is that
    of the last policy token before it.
    """
    sequences = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    response_length = torch.tensor([len(r) for r in responses])
    reward = torch.zeros(len(responses), int(response_length.max()))
    for row, (score, length) in enumerate(zip(scores, response_length.tolist(), strict=True)):
        if isinstance(score, Tensor):
            reward[row, :length] = score
        else:
            reward[row, length - 1] = score
    drawn, turns = None, None
    if policy_tokens is not None:
        drawn = _pad(policy_tokens, False)
        place = torch.arange(drawn.shape[1])
        last = torch.where(drawn, place, 0).cummax(dim=1).values
        reward = torch.zeros_like(reward).scatter_add_(1, last, reward)
        following = torch.nn.functional.pad(drawn[:, 1:], (0, 1))
        answered = drawn & ~following & (place + 1 < response_length[:, None])
        turns = Turns(answered.to(device), torch.where(answered, reward, 0.0).to(device))
    return Batch(
        tokens=_pad(sequences, pad_token_id).to(device),
        prompt_length=torch.tensor([len(p) for p in prompts]).to(device),
        response_length=response_length.to(device),
        group=torch.tensor(group).to(device),
        reward=reward.to(device),
        sampler_logprob=_pad(logprobs, 0.0).to(device),
        truncated=torch.tensor(truncated).to(device),
        score=reward.sum(dim=1).to(device),
        ignored=torch.zeros(len(responses), dtype=torch.bool, device=device),
        known_lengths=([len(p) for p in prompts], response_length.tolist()),
        policy_tokens=None if drawn is None else drawn.to(device),
        turns=turns,
    )


def _pad(rows: Sequence[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


@dataclass
class Packing:
    """How b sequences lie behind each other in one row of S tokens."""

    position_ids: Tensor
    """int64 [1, S]: from 0 in each sequence."""
    sequence: Tensor
    """int64 [1, S], in 0 … b - 1."""
    starts: Tensor
    """int32 [b + 1]: where each begins, and S."""


@dataclass
class MicroBatch:
    """Some rows of a batch as a model sees them, and where their N response tokens lie."""

    rows: Tensor
    """int64 [b]: rows of the batch."""
    input_ids: Tensor
    """int64 [b, s]: padded on the right to the longest of these rows; or, packed or with shared prompts, [1, S]."""
    length: Tensor
    """int64 [b]: tokens of each sequence."""
    grid: tuple[Tensor, Tensor]
    """Two int64 [N]: row of the batch and response position of each response token, for indexing [B, T] tensors."""
    predicts: tuple[Tensor, Tensor]
    """Two int64 [N]: row and column of ``input_ids`` whose hidden state predicts that token."""
    response: Tensor
    """int64 [N], in 0 … b - 1: which of ``rows`` each response token belongs to."""
    targets: Tensor
    """int64 [N]: the response tokens that the policy drew; -100 for others, of which it says nothing."""
    tokens: int
    """Of all sequences, without padding; shared prompts count once."""
    longest: int
    """Tokens of the longest sequence."""
    longest_response: int
    """Tokens of the longest response."""
    packing: Packing | None = None
    """None: not packed."""
    sharing: SharedPrompts | None = None
    """None: each sequence has its prompt."""

    @property
    def attention_mask(self) -> Tensor:
        """int64 of the shape of ``input_ids``: 0 on padding."""
        if self.packing is not None:
            return torch.ones_like(self.input_ids)
        return (torch.arange(self.input_ids.shape[1], device=self.length.device) < self.length[:, None]).long()

    @property
    def flat_predicts(self) -> Tensor:
        """int64 [N]: ``predicts`` as one number, row * s + column."""
        row, column = self.predicts
        return row * self.input_ids.shape[1] + column

    def select(self, hidden: Tensor) -> Tensor:
        """Return the hidden states [N, H], of [b, s, H], that predict the response tokens."""
        return hidden.flatten(0, 1).index_select(0, self.flat_predicts)

    def at_predicting(self, of_tokens: Tensor) -> Tensor:
        """Return what is of a response token, of [B, T, F], at the position that predicts it: of the shape of
        ``input_ids``, and F; 0 elsewhere."""
        out = of_tokens.new_zeros(*self.input_ids.shape, of_tokens.shape[-1])
        out[self.predicts] = of_tokens[self.grid]
        return out


def micro_batch(
    batch: Batch,
    rows: Tensor | Sequence[int],
    width: int | None = None,
    *,
    packed: bool = False,
    shared: bool = False,
) -> MicroBatch:
    """Cut ``rows`` (int64 [b]) out of ``batch``, padded to ``width`` (None: to the longest of them), or ``packed``, or
    with the prompts of neighbours ``shared``."""
    numbers = rows.tolist() if isinstance(rows, Tensor) else list(rows)
    prompts, responses = ([of[row] for row in numbers] for of in batch.on_host)
    lengths = [p + r for p, r in zip(prompts, responses, strict=True)]
    own, prompt, length, of_response = to_device([numbers, prompts, lengths, responses], batch.tokens.device)
    response, position = _ragged(of_response, sum(responses))
    grid, column, total = (own[response], position), prompt[response] - 1 + position, sum(lengths)
    longest, longest_response = max(lengths, default=0), max(responses, default=0)
    targets = batch.tokens[own[response], column + 1]
    if batch.policy_tokens is not None:
        targets = targets.where(batch.policy_tokens[grid], -100)
    if shared:
        sharing = lay_out([batch.prompt_number[row] for row in numbers], prompts, responses)
        sequence, place = sharing.source
        ids, predicts = batch.tokens[own[sequence], place][None], (torch.zeros_like(column), sharing.predicts)
        found = grid, predicts, response, targets, len(place), longest, longest_response
        return MicroBatch(own, ids, length, *found, sharing=sharing)
    if not packed:
        ids = batch.tokens[own, : longest if width is None else width]
        found = grid, (response, column), response, targets, total, longest, longest_response
        return MicroBatch(own, ids, length, *found)
    sequence, place = _ragged(length, total)
    starts = torch.nn.functional.pad(length.cumsum(0), (1, 0))
    return MicroBatch(
        rows=own,
        input_ids=batch.tokens[own[sequence], place][None],
        length=length,
        grid=grid,
        predicts=(torch.zeros_like(column), starts[response] + column),
        response=response,
        targets=targets,
        tokens=total,
        longest=longest,
        longest_response=longest_response,
        packing=Packing(place[None], sequence[None], starts.int()),
    )


def to_device(numbers: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return int64 ``numbers`` on ``device``; the host does not wait until they are there."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _ragged(length: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Of each of the ``total`` elements of ragged rows (lengths int64 [b]): its row and its place there, both int64
    [total]."""
    row = torch.repeat_interleave(length, output_size=total)
    first = length.cumsum(0) - length
    return row, torch.arange(total, device=length.device) - first[row]


def empty_micro_batch(batch: Batch, *, packed: bool = False, shared: bool = False) -> MicroBatch:
    """Return a micro-batch of one padding token and no response: a pass over it computes nothing, but takes part in
    the communication between ranks."""
    none = batch.tokens.new_zeros(0)
    token = batch.tokens.new_zeros(1, 1)
    packing = Packing(token, token, torch.arange(2, dtype=torch.int32, device=token.device)) if packed else None
    sharing = lay_out([0], [1], [0]) if shared else None
    return MicroBatch(none, token, token.new_ones(1), *((none, none),) * 2, none, none, 1, 1, 1, packing, sharing)


def at_most(max_tokens: int, models: int, device: torch.device) -> int:
    """Tokens of a pass of so many models side by side."""
    return min(max_tokens, models * CPU_TOKENS * _threads()) if device.type == "cpu" else max_tokens


@cache
def _threads() -> int:
    """Threads of a rank: the main one's, since all cut the same micro-batches."""
    return from_main(torch.get_num_threads)


def micro_batches(
    batch: Batch, rows: Tensor, max_tokens: int, at_least: int = 1, *, packed: bool = False, shared: bool = False
) -> Iterator[MicroBatch]:
    """Cut this rank's part of ``rows`` into micro-batches of at most ``max_tokens`` tokens, padding included, on a CPU
    also of at most ``CPU_TOKENS`` a thread, and at least ``at_least`` of them where there are that many rows. Rows of
    like length go together, so that padding is small; ``packed``, there is none; ``shared``, rows of one prompt go
    together, which is there once. Every rank gets the same number, some of them empty if need be."""
    max_tokens = at_most(max_tokens, 1, batch.tokens.device)
    parts = divide_rows(rows.cpu(), batch.host_length)
    pieces = [list(_pieces(batch, own, max_tokens, at_least, packed, shared)) for own in parts]
    for own in _in_step(pieces):
        if own is None:
            yield empty_micro_batch(batch, packed=packed, shared=shared)
        else:
            yield micro_batch(batch, own, packed=packed, shared=shared)


def _longest_first(batch: Batch, rows: Tensor) -> list[int]:
    """``rows``, on the CPU."""
    return rows[torch.argsort(batch.host_length[rows], descending=True, stable=True)].tolist()


def _pieces(
    batch: Batch, rows: Tensor, max_tokens: int, at_least: int, packed: bool, shared: bool
) -> Iterator[list[int]]:
    order = _longest_first(batch, rows)
    prompts, responses = batch.on_host
    if shared:
        numbers = batch.prompt_number
        order.sort(key=lambda row: numbers[row])
    start = 0
    while start < len(order):
        even = -(-(len(order) - start) // max(at_least, 1))
        if shared:
            # A row brings its response, and its prompt where the one before has another.
            new = (i == start or numbers[order[i]] != numbers[order[i - 1]] for i in range(start, len(order)))
            tokens = (responses[row] + one * prompts[row] for row, one in zip(order[start:], new, strict=True))
        else:
            tokens = (prompts[row] + responses[row] for row in order[start:])
        if packed or shared:
            count = sum(1 for _ in itertools.takewhile(lambda total: total <= max_tokens, itertools.accumulate(tokens)))
        else:
            # The first row is the longest of its piece, so it decides how many rows fit.
            count = max_tokens // next(tokens)
        count = min(even, max(1, count))
        yield order[start : start + count]
        start += count
        at_least -= 1


def share_micro_batches(
    batch: Batch, shares: Sequence[Tensor], max_tokens: int, *, shared: bool = False
) -> Iterator[list[MicroBatch]]:
    """Cut this rank's part of M shares (int64 [b_m] each) side by side: yield M micro-batches of one width, one a
    share, that have at most ``max_tokens`` tokens together, padding included, on a CPU also at most ``CPU_TOKENS`` each
    for a thread. The micro-batch of a share that has run out has no rows. Every rank gets the same number. ``shared``:
    rows of one prompt go together, which is there once, and each micro-batch is of its own width."""
    max_tokens = at_most(max_tokens, len(shares), batch.tokens.device)
    by_rank = zip(*(divide_rows(rows.cpu(), batch.host_length) for rows in shares), strict=True)
    if shared:
        own_tokens = max(1, max_tokens // len(shares))
        every = [[_pieces(batch, rows, own_tokens, 1, False, True) for rows in rank_rows] for rank_rows in by_rank]
        for piece in _in_step([list(itertools.zip_longest(*own, fillvalue=())) for own in every]):
            yield [
                micro_batch(batch, own, shared=True) if own else empty_micro_batch(batch, shared=True)
                for own in piece or [()] * len(shares)
            ]
        return
    pieces = [list(_pieces_side_by_side(batch, rank_rows, max_tokens)) for rank_rows in by_rank]
    for own in _in_step(pieces):
        if own is None:
            yield [empty_micro_batch(batch) for _ in shares]
        else:
            rows, width = own
            yield [micro_batch(batch, share_rows, width) for share_rows in rows]


def _pieces_side_by_side(
    batch: Batch, shares: Sequence[Tensor], max_tokens: int
) -> Iterator[tuple[list[list[int]], int]]:
    orders = [_longest_first(batch, rows) for rows in shares]
    lengths = [[sum(of[row] for of in batch.on_host) for row in order] for order in orders]
    start = 0
    while start < max(map(len, lengths)):
        # The first row of each share is the longest of its piece.
        width = max(share_rows[start] for share_rows in lengths if start < len(share_rows))
        end = start + max(1, max_tokens // (width * len(shares)))
        yield [order[start:end] for order in orders], width
        start = end


def minibatches(
    rows: Tensor, num_iterations: int, num_mini_batches: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield ``num_iterations`` shuffled passes over ``rows``, each cut into ``num_mini_batches`` even parts."""
    for _ in range(num_iterations):
        order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        yield from (part for part in order.tensor_split(num_mini_batches) if len(part))


def token_imbalance(batch: Batch, passes: Sequence[Tensor]) -> float:
    """Return the tokens of the rank that has most over those of the mean rank, summed over ``passes``, the rows (int64
    [b]) of each; 1 is even."""
    busiest = everyone = 0.0
    for rows in passes:
        loads = [float(batch.host_length[own].sum()) for own in divide_rows(rows.cpu(), batch.host_length)]
        busiest, everyone = busiest + max(loads) * len(loads), everyone + sum(loads)
    return busiest / everyone


def _in_step(by_rank: Sequence[list[T]]) -> Iterator[T | None]:
    """Yield what is this rank's, and then None until the rank that has most is done, too: in every pass all ranks
    communicate."""
    own = by_rank[rank()]
    for i in range(max(map(len, by_rank))):
        yield own[i] if i < len(own) else None
