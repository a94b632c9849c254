"""``agreement_masks`` in torch: a radix select over the bits of the standard deviations.

Non-negative floats are ordered as their bits are, read as an integer. Both order statistics are found from the top
digit down, in three rounds: count the tokens of each next digit among those that match the digits known so far
(``count``), then step to the digit that holds the wanted rank (``descend``). Only counts cross ranks, summed exactly,
so the result does not depend on how tokens are divided among them, and no rank needs to know another's size.

``state`` [2, 2] int64 holds, for low and for high, the digits known so far and the rank among the tokens matching them.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFTS = (20, 10, 0)  # of the three digits: bits 30-20, 19-10 and 9-0; bit 31 is the sign
BINS = (2**11, 2**10, 2**10)


def rows(level: int) -> int:
    """How many rows of counts a level has: the first one's serves low and high."""
    return 1 if level == 0 else 2


def count(std: Tensor, mask: Tensor, state: Tensor, level: int) -> Tensor:
    """Count the valid tokens by their digit ``level`` among those that match ``state``.

    Returns int64 [2, BINS[level]]; at level 0, where no digit is known and both rows are one, [1, BINS[0]].
    """
    shift, bins = SHIFTS[level], BINS[level]
    # abs also clears the sign of -0.0 and of NaN. A masked token's key is -1, all bits set, which matches nothing.
    key = (std.float().abs().view(torch.int32) | (mask.int() - 1)).flatten() >> shift
    prefixes = (state[:, 0] >> shift).int()[: rows(level)]
    counts = torch.zeros(len(prefixes), bins + 2, dtype=torch.int64, device=std.device)
    one = counts.new_ones(()).expand_as(key)
    for row, prefix in zip(counts, prefixes, strict=True):
        # Keys below and above the prefix fall into the first and the last bin.
        row.scatter_add_(0, (key - prefix).clamp_(-1, bins).add_(1).long(), one)
    return counts[:, 1:-1].clone(memory_format=torch.contiguous_format)


def descend(counts: Tensor, state: Tensor, level: int, low_ppm: int, high_ppm: int) -> Tensor:
    """Return the state with digit ``level`` known, given its counts over all ranks."""
    prefix, rank = state.unbind(1)
    if level == 0:
        n = counts[0].sum()
        # Of no tokens both ranks are -1, below every count: all digits are 0.
        rank = torch.stack([torch.minimum(n * low_ppm // 10**6, n - 1), n - 1 - n * high_ppm // 10**6])
    total = counts.cumsum(1)
    digit = (total <= rank[:, None]).sum(1)
    below = (total - counts).expand(2, -1).gather(1, digit[:, None]).squeeze(1)
    return torch.stack([prefix + (digit << SHIFTS[level]), rank - below], 1)


def apply(std: Tensor, mask: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return advantage_keep, entropy_keep, low and high, given the state after the last level."""
    low, high = (key.int().view(torch.float32) for key in state[:, 0])
    std, mask = std.float().contiguous(), mask.contiguous()
    return mask & ~(std < low), mask & ~(std > high), low, high
