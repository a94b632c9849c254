"""The Triton kernels of ``ensemble_gae``: the recurrence of ``torch_form``, as associative scans.

Time runs from the right. A thread owns a group of sixteen consecutive steps, and the groups of a block are read last
group first, so that a scan towards higher indices walks back in time; within a group registers change their names. No
lane is flipped.

Two scans, in this order. The first finds the mean of the next valid step, which a difference is formed with before
anything is added up: sums of differences are as exact as a loop's. The second composes the maps A = d + c A' of the
steps, for both lambdas; a masked step is the identity.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from asyppo_kernels.ensemble_value.kernels import add_critic

GROUP: tl.constexpr = tl.constexpr(16)  # steps of a thread


@triton.jit
def first_known(known, known_but_last, known_before, other_before):
    """Of groups walked from the right, the mean of the earliest valid step, NaN if there is none.

    The second is the same without the group that was added last, which makes the scan exclusive, too. A mean that is
    NaN itself counts as none: its own difference makes all before it NaN in any case.
    """
    return (
        tl.where(known_before == known_before, known_before, known),
        tl.where(other_before == other_before, other_before, known),
    )


@triton.jit
def compose(c1, d1, c2, d2, c1_before, d1_before, c2_before, d2_before):
    """Compose the steps from some time on (first arguments) with those right before them."""
    return c1 * c1_before, d1_before + c1_before * d1, c2 * c2_before, d2_before + c2_before * d2


@triton.jit
def in_pieces(x):
    """Split [ROWS, GROUPS, 16] into the sixteen steps of the groups, in the order of time."""
    x = tl.reshape(x, (x.shape[0], x.shape[1], 2, 2, 2, 2))
    even, odd = tl.split(x)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    a0, a4 = tl.split(a)
    b1, b5 = tl.split(b)
    c2, c6 = tl.split(c)
    d3, d7 = tl.split(d)
    x0, x8 = tl.split(a0)
    x1, x9 = tl.split(b1)
    x2, x10 = tl.split(c2)
    x3, x11 = tl.split(d3)
    x4, x12 = tl.split(a4)
    x5, x13 = tl.split(b5)
    x6, x14 = tl.split(c6)
    x7, x15 = tl.split(d7)
    return x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15


@triton.jit
def in_one(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15):
    """Undo ``in_pieces``."""
    a = tl.join(tl.join(x0, x8), tl.join(x4, x12))
    b = tl.join(tl.join(x1, x9), tl.join(x5, x13))
    c = tl.join(tl.join(x2, x10), tl.join(x6, x14))
    d = tl.join(tl.join(x3, x11), tl.join(x7, x15))
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (x0.shape[0], x0.shape[1], 16))


@triton.jit
def of_the_last(x, number):
    """The last group's, of [ROWS, GROUPS]."""
    return tl.sum(tl.where(number == x.shape[1] - 1, x, 0.0), 1, keep_dims=True)


@triton.jit
def read_steps(
    value,
    reward,
    mask,
    row,
    time,
    b,
    t,
    value_k,
    value_b,
    value_t,
    reward_b,
    reward_t,
    mask_b,
    mask_t,
    M: tl.constexpr,
):
    """Read a tile: which steps are there and which count, their rewards, mean and deviation over M critics.

    Rewards are as they are found, masked ones included; mean and deviation of masked steps are 0.
    """
    inside = (row < b) & (time < t)
    row = row.to(tl.int64)
    time = time.to(tl.int64)
    valid = tl.load(mask + row * mask_b + time * mask_t, mask=inside, other=0) != 0
    r = tl.load(reward + row * reward_b + time * reward_t, mask=inside, other=0.0).to(tl.float32)
    at = value + row * value_b + time * value_t
    first = tl.where(valid, tl.load(at, mask=inside, other=0.0).to(tl.float32), 0.0)
    if M == 2:
        half = 0.5 * (tl.where(valid, tl.load(at + value_k, mask=inside, other=0.0).to(tl.float32), 0.0) - first)
        mean = first + half
        std = tl.abs(half)
    else:
        shift = tl.zeros_like(first)
        squares = tl.zeros_like(first)
        for k in tl.static_range(1, M):
            at += value_k
            v = tl.where(valid, tl.load(at, mask=inside, other=0.0).to(tl.float32), 0.0)
            shift, squares = add_critic(k, v - first, shift, squares)
        mean = first + shift
        std = tl.sqrt(squares / M)
    return inside, valid, r, mean, std


@triton.jit
def next_values(valid, mean, carry, number):
    """The mean of the next valid step after each step, where ``carry`` is that after the tile; and the next carry."""
    some = in_pieces(valid)
    means = in_pieces(mean)
    found = tl.full((mean.shape[0], mean.shape[1]), float("nan"), tl.float32)
    for j in tl.static_range(15, -1, -1):
        found = tl.where(some[j], means[j], found)
    known = tl.where((number == 0) & (found != found), carry, found)
    known, before = tl.associative_scan((known, tl.full(known.shape, float("nan"), tl.float32)), 1, first_known)
    x15 = tl.where(number == 0, carry, before)
    x14 = tl.where(some[15], means[15], x15)
    x13 = tl.where(some[14], means[14], x14)
    x12 = tl.where(some[13], means[13], x13)
    x11 = tl.where(some[12], means[12], x12)
    x10 = tl.where(some[11], means[11], x11)
    x9 = tl.where(some[10], means[10], x10)
    x8 = tl.where(some[9], means[9], x9)
    x7 = tl.where(some[8], means[8], x8)
    x6 = tl.where(some[7], means[7], x7)
    x5 = tl.where(some[6], means[6], x6)
    x4 = tl.where(some[5], means[5], x5)
    x3 = tl.where(some[4], means[4], x4)
    x2 = tl.where(some[3], means[3], x3)
    x1 = tl.where(some[2], means[2], x2)
    x0 = tl.where(some[1], means[1], x1)
    following = in_one(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
    return following, of_the_last(known, number)


@triton.jit
def from_the_right(x):
    """[ROWS, GROUPS, 16] as [ROWS, steps], last step first."""
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = in_pieces(x)
    x = in_one(x15, x14, x13, x12, x11, x10, x9, x8, x7, x6, x5, x4, x3, x2, x1, x0)
    return tl.reshape(x, (x.shape[0], x.shape[1] * 16))


@triton.jit
def in_time(x):
    """Undo ``from_the_right``; and the first step's in time, of each group."""
    x = tl.reshape(x, (x.shape[0], x.shape[1] // 16, 16))
    x15, x14, x13, x12, x11, x10, x9, x8, x7, x6, x5, x4, x3, x2, x1, x0 = in_pieces(x)
    return in_one(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15), x0


@triton.jit
def with_carry(d, c, carry, number):
    """As ``from_the_right`` of d, where ``carry``, the advantage after the tile, is taken into the last step."""
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = in_pieces(d)
    last = in_pieces(c)[15]
    x15 = tl.where(number == 0, x15 + last * carry, x15)
    x = in_one(x15, x14, x13, x12, x11, x10, x9, x8, x7, x6, x5, x4, x3, x2, x1, x0)
    return tl.reshape(x, (x.shape[0], x.shape[1] * 16))


@triton.jit
def row_decay(row_lam, row, b, gamma, decay):
    """Gamma lambda [ROWS, 1], of each row or one for all."""
    if row_lam is not None:
        decay = gamma * tl.load(row_lam + row, mask=row < b, other=0.0)
    return decay + tl.zeros_like(row).to(tl.float32)


@triton.jit
def summary_kernel(
    value,
    reward,
    mask,
    row_lam,
    summary,
    b,
    t,
    span,
    value_k,
    value_b,
    value_t,
    reward_b,
    reward_t,
    mask_b,
    mask_t,
    gamma,
    decay,
    value_decay,
    M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A program writes down what one chunk of one row does to what comes after it, into ``summary`` [B, chunks, 7].

    The mean after the chunk is not known here, so that the difference of its last valid step is left open: its reward
    and mean are kept, and the map is that of the other steps. Written are the mean of the first valid step (NaN if
    there is none), reward and mean of the last, and c and d of the map for both lambdas. The first chunk of a row has
    no summary, since nothing stands before it.
    """
    chunks = tl.num_programs(0) // b + 1
    row = tl.program_id(0) // (chunks - 1)
    chunk = tl.program_id(0) % (chunks - 1) + 1
    start = chunk * span
    GROUPS: tl.constexpr = BLOCK_T // 16
    number = tl.arange(0, GROUPS)[None, :]
    step = ((GROUPS - 1) - number)[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    rows = row + tl.arange(0, 1)[:, None]
    decay = row_decay(row_lam, rows, b, gamma, decay)
    value_after = tl.full((1, 1), float("nan"), tl.float32)
    last_r = tl.zeros((1, 1), tl.float32)
    last_m = tl.zeros((1, 1), tl.float32)
    e1 = tl.full((1, 1), 1.0, tl.float32)
    f1 = tl.zeros((1, 1), tl.float32)
    e2 = tl.full((1, 1), 1.0, tl.float32)
    f2 = tl.zeros((1, 1), tl.float32)
    blocks = tl.cdiv(tl.minimum(t - start, span), BLOCK_T)
    for i in range(blocks):
        time = start + (blocks - 1 - i) * BLOCK_T + step
        _, valid, r, mean, _ = read_steps(
            value, reward, mask, rows[:, :, None], time, b, t, value_k, value_b, value_t, reward_b, reward_t, mask_b,
            mask_t, M,
        )  # fmt: skip
        following, value_before = next_values(valid, mean, value_after, number)
        is_open = valid & (following != following) & (mean == mean)
        last_r += tl.sum(tl.sum(tl.where(is_open, r, 0.0), 2), 1, keep_dims=True)
        last_m += tl.sum(tl.sum(tl.where(is_open, mean, 0.0), 2), 1, keep_dims=True)
        value_after = value_before
        adds = valid & (is_open == 0)
        d = tl.where(adds, (r + gamma * following) - mean, 0.0)
        c1 = from_the_right(tl.where(adds, decay[:, :, None], 1.0))
        c2 = from_the_right(tl.where(adds, value_decay, 1.0))
        d = from_the_right(d)
        c1, d1, c2, d2 = tl.associative_scan((c1, d, c2, d), 1, compose)
        c1 = of_the_last(in_time(c1)[1], number)
        d1 = of_the_last(in_time(d1)[1], number)
        c2 = of_the_last(in_time(c2)[1], number)
        d2 = of_the_last(in_time(d2)[1], number)
        e1, f1, e2, f2 = compose(e1, f1, e2, f2, c1, d1, c2, d2)
    at = summary + (rows.to(tl.int64) * chunks + chunk) * 7
    tl.store(at, value_after)
    tl.store(at + 1, last_r)
    tl.store(at + 2, last_m)
    tl.store(at + 3, e1)
    tl.store(at + 4, f1)
    tl.store(at + 5, e2)
    tl.store(at + 6, f2)


@triton.jit
def after_the_chunk(summary, row, chunk, chunks, gamma, decay, value_decay, BLOCK_CHUNKS: tl.constexpr):
    """Mean and both advantages of the next valid step after a chunk, from the summaries of the chunks to its right."""
    number = tl.arange(0, BLOCK_CHUNKS)[None, :]
    other = chunks - 1 - number  # from the right
    after = other > chunk
    at = summary + (row.to(tl.int64) * chunks + other) * 7
    first = tl.load(at, mask=after, other=float("nan"))
    known = tl.where((number == 0) & (first != first), 0.0, first)
    known, before = tl.associative_scan((known, tl.full(known.shape, float("nan"), tl.float32)), 1, first_known)
    following = tl.where(number == 0, 0.0, before)
    last_r = tl.load(at + 1, mask=after, other=0.0)
    last_m = tl.load(at + 2, mask=after, other=0.0)
    c1 = tl.load(at + 3, mask=after, other=1.0)
    d1 = tl.load(at + 4, mask=after, other=0.0)
    c2 = tl.load(at + 5, mask=after, other=1.0)
    d2 = tl.load(at + 6, mask=after, other=0.0)
    some = first == first
    delta = tl.where(some, (last_r + gamma * following) - last_m, 0.0)
    d1 += c1 * delta
    d2 += c2 * delta
    c1 *= tl.where(some, decay, 1.0)
    c2 *= tl.where(some, value_decay, 1.0)
    _, d1, _, d2 = tl.associative_scan((c1, d1, c2, d2), 1, compose)
    last = number == chunks - 2 - chunk
    return (
        tl.sum(tl.where(last, known, 0.0), 1, keep_dims=True),
        tl.sum(tl.where(last, d1, 0.0), 1, keep_dims=True),
        tl.sum(tl.where(last, d2, 0.0), 1, keep_dims=True),
    )


@triton.jit
def gae_kernel(
    value,
    reward,
    mask,
    row_lam,
    summary,
    advantage,
    returns,
    mean_out,
    std_out,
    b,
    t,
    span,
    chunks,
    value_k,
    value_b,
    value_t,
    reward_b,
    reward_t,
    mask_b,
    mask_t,
    gamma,
    decay,
    value_decay,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """A program owns ROWS rows, walked in blocks from the right, or one chunk of one row where there are summaries."""
    rows = ((tl.program_id(0) // chunks) * ROWS + tl.arange(0, ROWS))[:, None]
    chunk = tl.program_id(0) % chunks
    GROUPS: tl.constexpr = BLOCK_T // 16
    number = tl.arange(0, GROUPS)[None, :]
    step = ((GROUPS - 1) - number)[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    decay = row_decay(row_lam, rows, b, gamma, decay)
    value_after = tl.zeros((ROWS, 1), tl.float32)  # of the next valid step after the block
    after1 = tl.zeros((ROWS, 1), tl.float32)
    after2 = tl.zeros((ROWS, 1), tl.float32)
    if summary is not None:
        value_after, after1, after2 = after_the_chunk(
            summary, rows, chunk, chunks, gamma, decay, value_decay, BLOCK_CHUNKS
        )
    start = chunk * span
    blocks = tl.cdiv(tl.minimum(t - start, span), BLOCK_T)
    for i in range(blocks):
        time = start + (blocks - 1 - i) * BLOCK_T + step
        inside, valid, r, mean, std = read_steps(
            value, reward, mask, rows[:, :, None], time, b, t, value_k, value_b, value_t, reward_b, reward_t, mask_b,
            mask_t, M,
        )  # fmt: skip
        at = rows[:, :, None].to(tl.int64) * t + time
        tl.store(mean_out + at, mean, mask=inside)
        tl.store(std_out + at, std, mask=inside)
        following, value_after = next_values(valid, mean, value_after, number)
        d = tl.where(valid, (r + gamma * following) - mean, 0.0)
        c1 = tl.where(valid, decay[:, :, None], 1.0)
        c2 = tl.where(valid, value_decay, 1.0)
        d1 = with_carry(d, c1, after1, number)
        d2 = with_carry(d, c2, after2, number)
        _, d1, _, d2 = tl.associative_scan((from_the_right(c1), d1, from_the_right(c2), d2), 1, compose)
        d1, first1 = in_time(d1)
        d2, first2 = in_time(d2)
        after1 = of_the_last(first1, number)
        after2 = of_the_last(first2, number)
        tl.store(advantage + at, tl.where(valid, d1, 0.0), mask=inside)
        tl.store(returns + at, tl.where(valid, d2 + mean, 0.0), mask=inside)
