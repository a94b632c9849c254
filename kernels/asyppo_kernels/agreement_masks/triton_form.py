"""``agreement_masks`` by Triton kernels: a launch that zeroes the counts, four that count, one that applies.

The digits: seven bits, then six, then nine twice. The first two levels count every token (that matches) in a histogram
of 128 bins in registers; thirteen bits known, few tokens match any more, unless there are ties, and each counts itself.
Each launch first takes the step that the launch before has counted for. With a process group the counts of each level
are summed over its ranks between the launches.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from asyppo_kernels._args import device_guard
from asyppo_kernels.agreement_masks import kernels

SHIFTS = (24, 18, 9, 0)  # of the four digits; bit 31 is the sign
BINS = (2**7, 2**6, 2**9, 2**9)
SPARSE = (False, False, True, True)
LEVELS = len(SHIFTS)
BLOCKS = (4096, 2048, 2048, 2048)
WARPS = (4, 4, 8, 8)
PROGRAMS = 1056  # at most; eight a multiprocessor of those that have 132


def width(level: int) -> int:
    """How many counts a level has: of low and of high, but for the first."""
    return BINS[level] * (1 if level == 0 else 2)


def forward(std: Tensor, mask: Tensor, low_ppm: int, high_ppm: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return advantage_keep, entropy_keep, low and high."""
    std, mask = std.contiguous(), mask.contiguous()
    widths = [width(level) for level in range(LEVELS)]
    counts = torch.zeros(sum(widths), dtype=torch.int64, device=std.device).split(widths)
    states = std.new_empty((LEVELS, 4), dtype=torch.int64)
    for level in range(LEVELS):
        _count(std, mask, counts[level - 1], states[level - 1], counts[level], states[level], level, low_ppm, high_ppm)
    return apply(std, mask, counts[-1], states[-1], low_ppm, high_ppm)


def count(
    std: Tensor, mask: Tensor, counts_before: Tensor, state_before: Tensor, level: int, low_ppm: int, high_ppm: int
) -> tuple[Tensor, Tensor]:
    """Return the counts [width] of ``level`` and the state [4], given those of the level before, over all ranks."""
    counts = torch.zeros(width(level), dtype=torch.int64, device=std.device)
    state = torch.empty_like(state_before)
    _count(std.contiguous(), mask.contiguous(), counts_before, state_before, counts, state, level, low_ppm, high_ppm)
    return counts, state


def _count(
    std: Tensor,
    mask: Tensor,
    counts_before: Tensor,
    state_before: Tensor,
    counts: Tensor,
    state: Tensor,
    level: int,
    low_ppm: int,
    high_ppm: int,
) -> None:
    n = std.numel()
    with device_guard(std):
        kernels.count_kernel[_grid(n, BLOCKS[level])](
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
            SHIFT_BEFORE=SHIFTS[max(level - 1, 0)],
            BINS_BEFORE=BINS[max(level - 1, 0)],
            SHIFT=SHIFTS[level],
            BINS=BINS[level],
            SPARSE=SPARSE[level],
            BLOCK=BLOCKS[level],
            num_warps=WARPS[level],
        )


def apply(
    std: Tensor, mask: Tensor, counts: Tensor, state: Tensor, low_ppm: int, high_ppm: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return advantage_keep, entropy_keep, low and high, given counts and state of the last level, over all ranks."""
    std, mask = std.contiguous(), mask.contiguous()
    advantage_keep, entropy_keep = torch.empty_like(mask), torch.empty_like(mask)
    low, high = std.new_empty((), dtype=torch.float32), std.new_empty((), dtype=torch.float32)
    n = std.numel()
    with device_guard(std):
        kernels.apply_kernel[_grid(n, BLOCKS[0])](
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
            SHIFT=SHIFTS[-1],
            BINS=BINS[-1],
            BLOCK=BLOCKS[0],
            num_warps=WARPS[0],
        )
    return advantage_keep, entropy_keep, low, high


def _grid(n: int, block: int) -> tuple[int]:
    return (max(1, min(triton.cdiv(n, block), PROGRAMS)),)
