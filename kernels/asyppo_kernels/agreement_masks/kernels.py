"""The Triton kernels of ``agreement_masks``: a radix select over the bits, as in ``torch_form``.

A round's step is taken by the launch of the next. Counts are integers, so the order in which they
are added does not matter, and any launch geometry gives one result.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def descend(counts, prefix, rank, high_row, shift, BINS: tl.constexpr):
    """Return a prefix with its next digit known, and the rank among the tokens that match it."""
    here = tl.load(counts + high_row * BINS + tl.arange(0, BINS))
    passed = tl.cumsum(here, 0) <= rank
    digit = tl.sum(passed.to(tl.int64), 0)
    below = tl.sum(tl.where(passed, here, 0), 0)
    return prefix + (digit << shift), rank - below


@triton.jit
def descend_both(counts, state, low_ppm, high_ppm, shift, FIRST: tl.constexpr, BINS: tl.constexpr):
    """Step for low and for high. While both have the same prefix, they share the first row of counts."""
    if FIRST:
        n = tl.sum(tl.load(counts + tl.arange(0, BINS)), 0)
        zero = n * 0
        # Of no tokens both ranks are -1, below every count: all digits are 0.
        low_rank = tl.minimum(n * low_ppm // 1000000, n - 1)
        low, low_rank = descend(counts, zero, low_rank, 0, shift, BINS)
        high, high_rank = descend(counts, zero, n - 1 - n * high_ppm // 1000000, 0, shift, BINS)
    else:
        low = tl.load(state)
        high = tl.load(state + 2)
        high_row = (low != high).to(tl.int32)
        high, high_rank = descend(counts, high, tl.load(state + 3), high_row, shift, BINS)
        low, low_rank = descend(counts, low, tl.load(state + 1), 0, shift, BINS)
    return low, low_rank, high, high_rank


@triton.jit
def read_keys(std, mask, at, n):
    """Read the bits of standard deviations, which are ordered as these are, and whether they count."""
    inside = at < n
    valid = tl.load(mask + at, mask=inside, other=0) != 0
    bits = tl.load(std + at, mask=inside, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    return inside, valid, bits & 0x7FFFFFFF  # without the sign of -0.0 and of NaN


@triton.jit
def add(counts, total, WIDTH: tl.constexpr):
    """Add a program's counts to those of all."""
    tl.atomic_add(counts + tl.arange(0, WIDTH), total.to(tl.int64), mask=total > 0, sem="relaxed")


@triton.jit
def count_kernel(
    std,
    mask,
    counts_before,
    state_before,
    counts,
    state,
    n,
    low_ppm,
    high_ppm,
    LEVEL: tl.constexpr,
    SHIFT_BEFORE: tl.constexpr,
    BINS_BEFORE: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    SPARSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step by the counts of the level before, then add this level's to ``counts``.

    Every program steps for itself; the first one writes the state down for the next launch. A program walks the tokens
    at the stride of the grid. At a ``SPARSE`` level so few tokens of a block match, unless there are many ties, that
    each may count itself in global memory.
    """
    if LEVEL > 0:
        low, low_rank, high, high_rank = descend_both(
            counts_before, state_before, low_ppm, high_ppm, SHIFT_BEFORE, LEVEL == 1, BINS_BEFORE
        )
        if tl.program_id(0) == 0:
            tl.store(state, low)
            tl.store(state + 1, low_rank)
            tl.store(state + 2, high)
            tl.store(state + 3, high_rank)
        low = (low >> SHIFT).to(tl.int32)
        high = (high >> SHIFT).to(tl.int32)
    elif tl.program_id(0) == 0:
        tl.store(state + tl.arange(0, 4), tl.zeros((4,), tl.int64))
    WIDTH: tl.constexpr = BINS if LEVEL == 0 else 2 * BINS
    total = tl.zeros((WIDTH,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(first, n, step):
        _, valid, key = read_keys(std, mask, start + tl.arange(0, BLOCK), n)
        key = key >> SHIFT
        if LEVEL == 0:
            match = valid
            place = key
        else:
            over_low = key - low
            over_high = key - high
            in_low = (over_low >= 0) & (over_low < BINS)
            in_high = (over_high >= 0) & (over_high < BINS)
            match = valid & (in_low | in_high)
            place = tl.where(in_low, over_low, tl.where(in_high, over_high + BINS, 0))
        if SPARSE:
            if tl.sum(match.to(tl.int32), 0) * 16 <= BLOCK:
                tl.atomic_add(counts + place, tl.full((BLOCK,), 1, tl.int64), mask=match, sem="relaxed")
            else:
                add(counts, tl.histogram(place, WIDTH, mask=match), WIDTH)
        else:
            total += tl.histogram(place, WIDTH, mask=match)
    if not SPARSE:
        add(counts, total, WIDTH)


@triton.jit
def apply_kernel(
    std,
    mask,
    counts,
    state,
    advantage_keep,
    entropy_keep,
    low_out,
    high_out,
    n,
    low_ppm,
    high_ppm,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take the last step and compare."""
    low, _, high, _ = descend_both(counts, state, low_ppm, high_ppm, SHIFT, False, BINS)
    low = low.to(tl.int32)
    high = high.to(tl.int32)
    if tl.program_id(0) == 0:
        tl.store(low_out, low.to(tl.float32, bitcast=True))
        tl.store(high_out, high.to(tl.float32, bitcast=True))
    first = tl.program_id(0).to(tl.int64) * BLOCK
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(first, n, step):
        at = start + tl.arange(0, BLOCK)
        inside, valid, key = read_keys(std, mask, at, n)
        tl.store(advantage_keep + at, (valid & (key >= low)).to(tl.uint8), mask=inside)
        is_nan = key > 0x7F800000
        tl.store(entropy_keep + at, (valid & ((key <= high) | is_nan)).to(tl.uint8), mask=inside)
