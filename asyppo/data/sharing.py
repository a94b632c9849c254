"""Prompts that several responses answer, once each: how they lie in one row with the responses behind them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class SharedPrompt:
    """A prompt and the responses to it, one behind the other."""

    start: int
    """Where the prompt begins in the row."""
    length: int
    """Of the prompt."""
    responses: tuple[int, ...]
    """Tokens of each response."""

    @property
    def middle(self) -> int:
        """Where the responses begin."""
        return self.start + self.length

    @property
    def end(self) -> int:
        """Where they end."""
        return self.middle + sum(self.responses)

    @cached_property
    def grid(self) -> Tensor | None:
        """int64 [G * T]: of each place in the responses padded to the longest, which of their tokens is there, padding
        being some other token of the same response; None where they are of one length."""
        if min(self.responses) == max(self.responses):
            return None
        length = torch.tensor(self.responses)[:, None]
        return (length.cumsum(0) - length + torch.arange(max(self.responses)).minimum(length - 1)).flatten()

    @cached_property
    def places(self) -> Tensor:
        """int64 [n]: where in that grid each token of the responses is."""
        inside = torch.arange(max(self.responses)) < torch.tensor(self.responses)[:, None]
        return inside.flatten().nonzero()[:, 0]


@dataclass(frozen=True)
class SharedPrompts:
    """How b sequences lie in one row of S tokens."""

    position_ids: Tensor
    """int64 [1, S]: a token's place in its own sequence."""
    source: tuple[Tensor, Tensor]
    """Two int64 [S]: which of the sequences the token is of (a prompt's are of the first with it), and its place
    there."""
    predicts: Tensor
    """int64 [N]: where in S what predicts each response token lies; that of the first is its prompt's last token."""
    parts: tuple[SharedPrompt, ...]


def lay_out(prompts: Sequence[int], prompt_lengths: Sequence[int], responses: Sequence[int]) -> SharedPrompts:
    """Lay out sequences with the ``prompts`` of these numbers, on the CPU: equal neighbours share theirs."""
    parts, start = [], 0
    segments: list[tuple[int, int, int]] = []  # sequence, first place in it, tokens
    before: list[tuple[int, int]] = []  # of each response: where its prompt ends, and where it begins
    for _, run in itertools.groupby(range(len(prompts)), key=lambda i: prompts[i]):
        rows = list(run)
        part = SharedPrompt(start, prompt_lengths[rows[0]], tuple(responses[i] for i in rows))
        segments.append((rows[0], 0, part.length))
        behind = part.middle
        for i in rows:
            segments.append((i, part.length, responses[i]))
            before.append((part.middle - 1, behind))
            behind += responses[i]
        parts.append(part)
        start = part.end
    sequence, first, count = torch.tensor(segments).view(-1, 3).unbind(1)
    segment = torch.repeat_interleave(count)
    place = torch.arange(len(segment)) - (count.cumsum(0) - count)[segment] + first[segment]
    last, begin = torch.tensor(before).view(-1, 2).unbind(1)
    length = torch.tensor(responses, dtype=torch.int64)
    response = torch.repeat_interleave(length)
    token = torch.arange(len(response)) - (length.cumsum(0) - length)[response]
    predicts = torch.where(token == 0, last[response], begin[response] + token - 1)
    return SharedPrompts(place[None], (sequence[segment], place), predicts, tuple(parts))
