"""A batch of responses, and how it is cut into pieces that fit in memory.

Two layouts meet here. Models see sequences: prompt and response of one sample side by side, padded on the right.
Everything of reinforcement learning (log-probs, values, rewards, masks) lives on the *response grid* [B, T]: entry
[b, t] belongs to token t of response b, and is False in ``mask`` past its end. What a model computes for token t is
read at the position that predicts it, one to the left. Lengths, not token ids, say what is padding, so a padding
token equal to the end-of-sequence token is no problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from asyppo.distributed.processes import divide_rows, rank

T = TypeVar("T")


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

    @property
    def mask(self) -> Tensor:
        """bool [B, T]: True on response tokens."""
        steps = torch.arange(self.reward.shape[1], device=self.tokens.device)
        return steps < self.response_length[:, None]

    @property
    def learned(self) -> Tensor:
        """bool [B, T]: the response tokens that losses count."""
        return self.mask & ~self.ignored[:, None]

    @property
    def length(self) -> Tensor:
        """int64 [B]: tokens of prompt and response."""
        return self.prompt_length + self.response_length

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
) -> Batch:
    """Lay B prompts and responses (int64 [length] each) out as a Batch on ``device``.

    A response's score is a number, or a reward for each of its tokens (float32 [length]).
    """
    sequences = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    response_length = torch.tensor([len(r) for r in responses])
    reward = torch.zeros(len(responses), int(response_length.max()))
    for row, (score, length) in enumerate(zip(scores, response_length.tolist(), strict=True)):
        if isinstance(score, Tensor):
            reward[row, :length] = score
        else:
            reward[row, length - 1] = score
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
    )


def _pad(rows: Sequence[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


@dataclass
class MicroBatch:
    """Some rows of a batch as a model sees them, and where their N response tokens lie."""

    rows: Tensor
    """int64 [b]: rows of the batch."""
    input_ids: Tensor
    """int64 [b, s]: padded on the right to the longest of these rows."""
    attention_mask: Tensor
    """int64 [b, s]."""
    grid: tuple[Tensor, Tensor]
    """Two int64 [N]: row of the batch and response position of each response token, for indexing [B, T] tensors."""
    predicts: tuple[Tensor, Tensor]
    """Two int64 [N]: row and column of ``input_ids`` whose hidden state predicts that token."""

    @property
    def targets(self) -> Tensor:
        """int64 [N]: the response tokens."""
        row, column = self.predicts
        return self.input_ids[row, column + 1]

    @property
    def response(self) -> Tensor:
        """int64 [N], in 0 … b - 1: which of ``rows`` each response token belongs to."""
        return self.predicts[0]

    @property
    def flat_predicts(self) -> Tensor:
        """int64 [N]: ``predicts`` as one number, row * s + column."""
        row, column = self.predicts
        return row * self.input_ids.shape[1] + column

    def select(self, hidden: Tensor) -> Tensor:
        """Return the hidden states [N, H], of [b, s, H], that predict the response tokens."""
        return hidden.flatten(0, 1).index_select(0, self.flat_predicts)


def micro_batch(batch: Batch, rows: Tensor, width: int | None = None) -> MicroBatch:
    """Cut ``rows`` (int64 [b]) out of ``batch``, padded to ``width`` (None: to the longest of them)."""
    length = batch.length[rows]
    width = int(length.max()) if width is None else width
    mask = torch.arange(width, device=rows.device) < length[:, None]
    local_row, position = batch.mask[rows].nonzero(as_tuple=True)
    return MicroBatch(
        rows=rows,
        input_ids=batch.tokens[rows, :width],
        attention_mask=mask.long(),
        grid=(rows[local_row], position),
        predicts=(local_row, batch.prompt_length[rows][local_row] - 1 + position),
    )


def empty_micro_batch(batch: Batch) -> MicroBatch:
    """Return a micro-batch of one padding token and no response: a pass over it computes nothing, but takes part in
    the communication between ranks."""
    none = batch.tokens.new_zeros(0)
    token = batch.tokens.new_zeros(1, 1)
    return MicroBatch(none, token, torch.ones_like(token), (none, none), (none, none))


def micro_batches(batch: Batch, rows: Tensor, max_tokens: int, at_least: int = 1) -> Iterator[MicroBatch]:
    """Cut this rank's part of ``rows`` into micro-batches of at most ``max_tokens`` tokens, padding included, and at
    least ``at_least`` of them where there are that many rows. Rows of like length go together, so that padding is
    small. Every rank gets the same number, some of them empty if need be."""
    pieces = [list(_pieces(batch, own, max_tokens, at_least)) for own in divide_rows(rows, batch.length)]
    for own in _in_step(pieces):
        yield empty_micro_batch(batch) if own is None else micro_batch(batch, own)


def _pieces(batch: Batch, rows: Tensor, max_tokens: int, at_least: int) -> Iterator[Tensor]:
    order = rows[torch.argsort(batch.length[rows], descending=True, stable=True)]
    lengths = batch.length[order].tolist()
    start = 0
    while start < len(lengths):
        even = -(-(len(lengths) - start) // max(at_least, 1))
        # The first row is the longest of its piece, so it decides how many rows fit.
        count = min(even, max(1, max_tokens // lengths[start]))
        yield order[start : start + count]
        start += count
        at_least -= 1


def share_micro_batches(batch: Batch, shares: Sequence[Tensor], max_tokens: int) -> Iterator[list[MicroBatch]]:
    """Cut this rank's part of M shares (int64 [b_m] each) side by side: yield M micro-batches of one width, one a
    share, that have at most ``max_tokens`` tokens together, padding included. The micro-batch of a share that has run
    out has no rows. Every rank gets the same number."""
    by_rank = zip(*(divide_rows(rows, batch.length) for rows in shares), strict=True)
    pieces = [list(_pieces_side_by_side(batch, rank_rows, max_tokens)) for rank_rows in by_rank]
    for own in _in_step(pieces):
        if own is None:
            yield [empty_micro_batch(batch) for _ in shares]
        else:
            rows, width = own
            yield [micro_batch(batch, share_rows, width) for share_rows in rows]


def _pieces_side_by_side(batch: Batch, shares: Sequence[Tensor], max_tokens: int) -> Iterator[tuple[list[Tensor], int]]:
    orders = [rows[torch.argsort(batch.length[rows], descending=True, stable=True)] for rows in shares]
    lengths = [batch.length[order].tolist() for order in orders]
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
        loads = [float(batch.length[own].sum()) for own in divide_rows(rows, batch.length)]
        busiest, everyone = busiest + max(loads) * len(loads), everyone + sum(loads)
    return busiest / everyone


def _in_step(by_rank: Sequence[list[T]]) -> Iterator[T | None]:
    """Yield what is this rank's, and then None until the rank that has most is done, too: in every pass all ranks
    communicate."""
    own = by_rank[rank()]
    for i in range(max(map(len, by_rank))):
        yield own[i] if i < len(own) else None
