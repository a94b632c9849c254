"""The Triton kernels of ``agreement_masks``: a select by counting, bin within bin; see ``triton_form``.

Keys are the bits of standard deviations, which are ordered as these are. A level's step is taken by the launch of the
next. Counts are integers, so the order in which they are added does not matter, and any launch geometry gives one
result.

``span`` [2] int64: the lowest key of a sample, negated, and the highest, so that the maximum over ranks is one of both.
``state`` [6] int64: first key, rank among the keys from there on, and width of the bin that is known to hold the low
threshold; the same of the high one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

TWO = tl.constexpr(0x40000000)  # the key of 2.0, and the middle of all
NONE = tl.constexpr(-0x7FFFFFFF)  # as low as the negated key of a NaN, below all others, negated or not


@triton.jit
def read_keys(std, mask, at, n):
    """Read the keys, and whether they count."""
    inside = at < n
    valid = tl.load(mask + at, mask=inside, other=0) != 0
    bits = tl.load(std + at, mask=inside, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    return inside, valid, bits & 0x7FFFFFFF  # without the sign of -0.0 and of NaN


@triton.jit
def shift_below(number, BINS: tl.constexpr):
    """Return by how many bits a number has to be shifted to be less than BINS."""
    return tl.sum(((number >> tl.arange(0, 32)) >= BINS).to(tl.int32), 0)


@triton.jit
def first_bins(span, BINS: tl.constexpr):
    """Return (shift, first): bin b of level 0 holds the keys with ``key >> shift`` = first + b.

    But bin 0 holds the keys below, too, and bin BINS - 2 those above: what the sample missed. Since 2.0 is between,
    both are less than half of all keys wide. Bin BINS - 1 holds the tokens that do not count.
    """
    lowest = tl.minimum(-tl.load(span), TWO)
    highest = tl.maximum(tl.load(span + 1), TWO)
    shift = shift_below(highest - lowest, BINS - 4)
    return shift, (lowest >> shift) - 1


@triton.jit
def pass_over(counts, rank):
    """Return how many counts come before the one that holds a rank, and the rank without these."""
    passed = tl.cumsum(counts, 0) <= rank
    return tl.sum(passed.to(tl.int32), 0), rank - tl.sum(tl.where(passed, counts, 0), 0)


@triton.jit
def first_step(counts, shift, first, rank, BINS: tl.constexpr):
    """Return first key, rank and width of the bin of level 0 that holds a rank, by counts in the bins' order."""
    place, rank = pass_over(counts, rank)
    one = rank * 0 + 1
    start = tl.where(place == 0, 0, (first + place) << shift)
    end = tl.where(place == BINS - 2, one << 31, (first + place + 1) << shift)
    return start, rank, end - start


@triton.jit
def find(counts, rank, BINS: tl.constexpr):
    """Return the bin that holds a rank, and the rank among its keys: first the group of 32 bins, then the bin."""
    group = tl.sum(tl.load(counts + tl.arange(0, BINS // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]), 1)
    chosen, rank = pass_over(group, rank)
    chosen = tl.minimum(chosen, BINS // 32 - 1) * 32  # where nothing is counted, as the bin is known
    place, rank = pass_over(tl.load(counts + chosen + tl.arange(0, 32)), rank)
    return (chosen + place).to(tl.int64), rank


@triton.jit
def next_step(counts, start, rank, width, BINS: tl.constexpr):
    """Return the same of the bin within a bin; a bin of one key is left as it is, its keys are not counted."""
    place, inner_rank = find(counts, rank, BINS)
    shift = shift_below(width - 1, BINS)
    before = place << shift
    inner_width = tl.minimum((width * 0 + 1) << shift, width - before)
    known = width <= 1
    return (
        tl.where(known, start, start + before),
        tl.where(known, rank, inner_rank),
        tl.where(known, width, inner_width),
    )


@triton.jit
def step(counts, state, low_ppm, high_ppm, LEVEL: tl.constexpr, BINS: tl.constexpr):
    """Return (first key, rank, width) of low and of high. While both have the same bin, they share a row of counts."""
    if LEVEL == 0:
        shift, first = first_bins(state, BINS)
        place = tl.arange(0, BINS)
        here = tl.load(counts + ((first + place) & (BINS - 1)), mask=place < BINS - 1, other=0)
        n = tl.sum(here, 0)
        # Of no tokens both ranks are -1, below every count: the first bin each time.
        low_rank = tl.minimum(n * low_ppm // 1000000, n - 1)
        low, low_rank, low_width = first_step(here, shift, first, low_rank, BINS)
        high, high_rank, high_width = first_step(here, shift, first, n - 1 - n * high_ppm // 1000000, BINS)
    else:
        low = tl.load(state)
        high = tl.load(state + 3)
        row = (low != high).to(tl.int32)
        high, high_rank, high_width = next_step(counts + row * BINS, high, tl.load(state + 4), tl.load(state + 5), BINS)
        low, low_rank, low_width = next_step(counts, low, tl.load(state + 1), tl.load(state + 2), BINS)
    return low, low_rank, low_width, high, high_rank, high_width


@triton.jit
def add(counts, total, WIDTH: tl.constexpr):
    """Add a program's counts to those of all."""
    tl.atomic_add(counts + tl.arange(0, WIDTH), total.to(tl.int64), mask=total > 0, sem="relaxed")


@triton.jit
def begin_kernel(std, mask, counts, span, n, total, BLOCK: tl.constexpr):
    """Zero the counts; the first program takes the span of a sample, spread evenly but at no period.

    Of the lowest keys of four parts it is the highest, and the reverse, so that a few outliers do not widen it.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + at, tl.zeros((BLOCK,), tl.int64), mask=at < total)
    if tl.program_id(0) == 0:
        share = tl.arange(0, BLOCK).to(tl.int64) * 10368889 & 0xFFFFFF  # of 2^24; the step is the golden section
        _, valid, key = read_keys(std, mask, share * n >> 24, n)
        parts: tl.constexpr = (4, BLOCK // 4)
        lowest = tl.max(tl.reshape(tl.where(valid, -key, NONE), parts), 1)
        highest = tl.max(tl.reshape(tl.where(valid, key, NONE), parts), 1)
        seen = lowest > NONE
        some = tl.max(lowest, 0) > NONE
        tl.store(span, tl.where(some, tl.min(tl.where(seen, lowest, 0), 0), NONE).to(tl.int64))
        tl.store(span + 1, tl.where(some, tl.min(tl.where(seen, highest, -NONE), 0), NONE).to(tl.int64))


@triton.jit
def count_all_kernel(std, mask, span, counts, n, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Level 0: count all tokens, bin b at ``(first + b) % BINS``. A program walks them at the stride of the grid."""
    shift, first_bin = first_bins(span, BINS)
    bottom = (first_bin << shift).to(tl.int32)
    top = tl.minimum((first_bin + BINS - 2) << shift, 0x7FFFFFFF).to(tl.int32)
    none = ((first_bin + BINS - 1) << shift).to(tl.int32)
    total = tl.zeros((BINS,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        _, valid, key = read_keys(std, mask, start + tl.arange(0, BLOCK), n)
        key = tl.where(valid, tl.minimum(tl.maximum(key, bottom), top), none)
        total += tl.histogram((key >> shift) & (BINS - 1), BINS)
    add(counts, total, BINS)


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
    BINS_BEFORE: tl.constexpr,
    BINS: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step by the counts of the level before, then add this level's to ``counts``.

    Every program steps for itself; the first one writes the state down for the next launch. Where few tokens of a block
    lie in a bin, each counts itself in global memory; where many do that are not ties, a histogram of PIECE bins after
    the other counts.
    """
    if LEVEL > 1:
        one_key = (tl.load(state_before + 2) <= BINS) & (tl.load(state_before + 5) <= BINS)  # after this step
        if one_key & (tl.program_id(0) > 0):  # only the state is left to write
            return
    low, low_rank, low_width, high, high_rank, high_width = step(
        counts_before, state_before, low_ppm, high_ppm, LEVEL - 1, BINS_BEFORE
    )
    if tl.program_id(0) == 0:
        tl.store(state, low)
        tl.store(state + 1, low_rank)
        tl.store(state + 2, low_width)
        tl.store(state + 3, high)
        tl.store(state + 4, high_rank)
        tl.store(state + 5, high_width)
    low_shift = shift_below(low_width - 1, BINS)
    high_shift = shift_below(high_width - 1, BINS)
    # A bin of one key is not counted.
    low_width = tl.where(low_width > 1, low_width, 0).to(tl.uint32)
    high_width = tl.where((high_width > 1) & (low != high), high_width, 0).to(tl.uint32)
    low = low.to(tl.int32)
    high = high.to(tl.int32)
    end = tl.where((low_width > 0) | (high_width > 0), n, 0)
    lane = tl.arange(0, BLOCK // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, end, tl.num_programs(0).to(tl.int64) * BLOCK):
        _, valid, key = read_keys(std, mask, start + lane, n)
        key = tl.where(valid, key, -1)  # lies in no bin
        over_low = (key - low).to(tl.uint32, bitcast=True)
        over_high = (key - high).to(tl.uint32, bitcast=True)
        place = tl.where(over_high < high_width, (over_high >> high_shift).to(tl.int32) + BINS, 2 * BINS)
        place = tl.where(over_low < low_width, (over_low >> low_shift).to(tl.int32), place)
        place = tl.reshape(place, (BLOCK,), can_reorder=True)  # as a thread has them
        match = place < 2 * BINS
        many = BLOCK - tl.sum((place.to(tl.uint32) // (2 * BINS)).to(tl.int32), 0)
        if many > 0:
            if many * 8 <= BLOCK:
                tl.atomic_add(counts + place, tl.full((BLOCK,), 1, tl.int64), mask=match, sem="relaxed")
            else:
                lowest = tl.min(place, 0)
                while lowest < 2 * BINS:
                    beyond = place >= lowest + PIECE
                    here = match & (place >= lowest) & ~beyond
                    add(counts + lowest, tl.histogram(place - lowest, PIECE, mask=here), PIECE)
                    lowest = tl.min(tl.where(beyond, place, 2 * BINS), 0)


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
    LEVEL: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take the last step and compare."""
    low, _, _, high, _, _ = step(counts, state, low_ppm, high_ppm, LEVEL, BINS)
    low = low.to(tl.int32)
    high = high.to(tl.int32)
    if tl.program_id(0) == 0:
        tl.store(low_out, low.to(tl.float32, bitcast=True))
        tl.store(high_out, high.to(tl.float32, bitcast=True))
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside, valid, key = read_keys(std, mask, at, n)
        tl.store(advantage_keep + at, (valid & (key >= low)).to(tl.uint8), mask=inside)
        is_nan = key > 0x7F800000
        tl.store(entropy_keep + at, (valid & ((key <= high) | is_nan)).to(tl.uint8), mask=inside)
