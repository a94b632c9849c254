"""``agreement_masks`` by Triton kernels: a launch that zeroes the counts, four that count, one that applies.

The first launch also looks at a sample of the tokens, and level 0 counts all tokens in 127 bins of keys, of which the
first and the last also hold what lies outside the sample's span. A level after it divides the bin that holds the low
threshold into up to 1,024, and the one that holds the high threshold. Any sample leads to the same thresholds. Mostly
the bins of level 0 hold few tokens and at most 2^20 keys, so that after two more levels both thresholds are known, and
the last one reads nothing; the widest bin, which a sample can miss, has 2^30.

Each launch first takes the step that the launch before has counted for. With a process group the span of the samples
and the counts of each level are reduced over its ranks between the launches.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from asyppo_kernels._args import device_guard
from asyppo_kernels.agreement_masks import kernels

BINS = (128, 1024, 1024, 1024)
LEVELS = len(BINS)
PIECE = 64  # bins of a histogram in registers
SAMPLE = 1024
BLOCK, INNER_BLOCK = 4096, 2048  # the second of the levels after the first
PROGRAMS = 528  # at most; four a multiprocessor of those that have 132


def width(level: int) -> int:
    """How many counts a level has: of low and of high, but for the first."""
    return BINS[level] * (1 if level == 0 else 2)


def forward(std: Tensor, mask: Tensor, low_ppm: int, high_ppm: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return advantage_keep, entropy_keep, low and high."""
    std, mask = std.contiguous(), mask.contiguous()
    widths = [width(level) for level in range(LEVELS)]
    counts, state = _begin(std, mask, sum(widths))
    before, *rest = counts.split(widths)
    _count_all(std, mask, state, before)
    for level, now in enumerate(rest, start=1):
        state = _count(std, mask, before, state, now, level, low_ppm, high_ppm)
        before = now
    return apply(std, mask, before, state, low_ppm, high_ppm)


def span(std: Tensor, mask: Tensor) -> Tensor:
    """Return the span [2] of a sample: its lowest key, negated, and its highest."""
    return _begin(std.contiguous(), mask.contiguous(), 0)[1]


def count_all(std: Tensor, mask: Tensor, span: Tensor) -> Tensor:
    """Return the counts [width] of level 0, given the span over all ranks."""
    counts = torch.zeros(width(0), dtype=torch.int64, device=std.device)
    _count_all(std.contiguous(), mask.contiguous(), span, counts)
    return counts


def count(
    std: Tensor, mask: Tensor, counts_before: Tensor, state_before: Tensor, level: int, low_ppm: int, high_ppm: int
) -> tuple[Tensor, Tensor]:
    """Return the counts [width] of a ``level`` > 0 and the state [6], given those of the level before, over all ranks.

    The state of level 0 is the span.
    """
    counts = torch.zeros(width(level), dtype=torch.int64, device=std.device)
    state = _count(std.contiguous(), mask.contiguous(), counts_before, state_before, counts, level, low_ppm, high_ppm)
    return counts, state


def _begin(std: Tensor, mask: Tensor, total: int) -> tuple[Tensor, Tensor]:
    counts, span = std.new_empty(total, dtype=torch.int64), std.new_empty(2, dtype=torch.int64)
    with device_guard(std):
        kernels.begin_kernel[(max(1, triton.cdiv(total, SAMPLE)),)](
            std, mask.view(torch.uint8), counts, span, std.numel(), total, BLOCK=SAMPLE, num_warps=8
        )
    return counts, span


def _count_all(std: Tensor, mask: Tensor, span: Tensor, counts: Tensor) -> None:
    n = std.numel()
    with device_guard(std):
        kernels.count_all_kernel[_grid(n, BLOCK)](
            std, mask.view(torch.uint8), span, counts, n, BINS=BINS[0], BLOCK=BLOCK
        )


def _count(
    std: Tensor,
    mask: Tensor,
    counts_before: Tensor,
    state_before: Tensor,
    counts: Tensor,
    level: int,
    low_ppm: int,
    high_ppm: int,
) -> Tensor:
    n = std.numel()
    state = std.new_empty(6, dtype=torch.int64)
    with device_guard(std):
        kernels.count_kernel[_grid(n, INNER_BLOCK)](
            std,
            mask.view(torch.uint8),
            counts_before,
            state_before,
            counts,
            state,
            n,
            low_ppm,
            high_ppm,
            LEVEL=level,
            BINS_BEFORE=BINS[level - 1],
            BINS=BINS[level],
            PIECE=PIECE,
            BLOCK=INNER_BLOCK,
        )
    return state


def apply(
    std: Tensor, mask: Tensor, counts: Tensor, state: Tensor, low_ppm: int, high_ppm: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return advantage_keep, entropy_keep, low and high, given counts and state of the last level, over all ranks."""
    std, mask = std.contiguous(), mask.contiguous()
    advantage_keep, entropy_keep = torch.empty_like(mask), torch.empty_like(mask)
    low, high = std.new_empty((), dtype=torch.float32), std.new_empty((), dtype=torch.float32)
    n = std.numel()
    with device_guard(std):
        kernels.apply_kernel[_grid(n, BLOCK)](
            std,
            mask.view(torch.uint8),
            counts,
            state,
            advantage_keep.view(torch.uint8),
            entropy_keep.view(torch.uint8),
            low,
            high,
            n,
            low_ppm,
            high_ppm,
            LEVEL=LEVELS - 1,
            BINS=BINS[-1],
            BLOCK=BLOCK,
        )
    return advantage_keep, entropy_keep, low, high


def _grid(n: int, block: int) -> tuple[int]:
    return (max(1, min(triton.cdiv(n, block), PROGRAMS)),)
