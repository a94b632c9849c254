"""The Triton kernels of ``ensemble_gae``: the recurrence of ``torch_form``, as associative scans.

Time runs from the right. A thread owns a group of sixteen consecutive steps, and the groups of a block are read last
group first, so that a scan towards higher indices walks back in time. A thread walks its group in registers: once for
what the group does to the steps before it, and again for the results, when a scan over the groups has told what comes
after it.

There are two such scans, in this order. The first finds the mean of the next valid step, which a difference is formed
with before anything is added up: sums of differences are as exact as a loop's. The second composes the maps
A = d + c A' of the steps, for both lambdas; a masked step is the identity.

Which steps count is held in integers of all bits or none: a thread's sixteen are more than a processor has predicates
for, and a choice by bits is one instruction.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from asyppo_kernels.ensemble_value.kernels import add_critic

GROUP: tl.constexpr = tl.constexpr(16)  # steps of a thread


@triton.jit
def first_known(known, known_before):
    """Of groups walked from the right, the mean of the earliest valid step, NaN if there is none.

    A mean that is NaN itself counts as none: its own difference makes all before it NaN in any case.
    """
    return tl.where(known_before == known_before, known_before, known)


@triton.jit
def compose(c1, d1, c2, d2, c1_before, d1_before, c2_before, d2_before):
    """Compose the steps from some time on (first arguments) with those right before them."""
    return c1 * c1_before, d1_before + c1_before * d1, c2 * c2_before, d2_before + c2_before * d2


@triton.jit
def kept(bits, x):
    """x where the step counts, 0 elsewhere, NaN or not."""
    return (x.to(tl.int32, bitcast=True) & bits).to(tl.float32, bitcast=True)


@triton.jit
def chosen(bits, x, other):
    """x where the step counts, and the other elsewhere."""
    x, other = tl.broadcast(x, other)
    x, other = x.to(tl.int32, bitcast=True), other.to(tl.int32, bitcast=True)
    return (other ^ (bits & (x ^ other))).to(tl.float32, bitcast=True)


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
def in_one(x):
    """Undo ``in_pieces``."""
    a = tl.join(tl.join(x[0], x[8]), tl.join(x[4], x[12]))
    b = tl.join(tl.join(x[1], x[9]), tl.join(x[5], x[13]))
    c = tl.join(tl.join(x[2], x[10]), tl.join(x[6], x[14]))
    d = tl.join(tl.join(x[3], x[11]), tl.join(x[7], x[15]))
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (x[0].shape[0], x[0].shape[1], 16))


@triton.jit
def after_each(nothing, x):
    """Two elements a group, [ROWS, 2 GROUPS]: a scan has in the first what the groups after it come to."""
    return tl.reshape(tl.join(nothing + tl.zeros_like(x), x), (x.shape[0], x.shape[1] * 2))


@triton.jit
def before_and_with(x):
    """Undo ``after_each``: scanned without the group, and with it."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def of_the_last(x):
    """The last group's, of [ROWS, GROUPS]."""
    return tl.gather(x, tl.full((x.shape[0], 1), x.shape[1] - 1, tl.int32), 1)


@triton.jit
def as_stored(x):
    """[ROWS, GROUPS, 16] in an order of axes by which sixteen bytes a lane go from a thread's group to memory.

    From the right: the four steps of a vector, two neighbouring groups, the four vectors of a group, four pairs of
    groups. Lanes are dealt out from the right, so that a warp writes whole lines; with the neighbours before the
    vectors, a thread's vectors go through shared memory as they are, where an exchange by matrices would take
    registers apart. What is left of the groups is a thread's own, at addresses that differ by constants.
    """
    LOW: tl.constexpr = 2 if x.shape[1] > 1 else 1
    MIDDLE: tl.constexpr = 4 if x.shape[1] > 4 else 1
    x = tl.reshape(x, (x.shape[0], x.shape[1] // (LOW * MIDDLE), MIDDLE, LOW, 4, 4))
    return tl.permute(x, (0, 1, 2, 4, 3, 5))


@triton.jit
def stored_steps(GROUPS: tl.constexpr):
    """The steps of a block in the order of ``as_stored``."""
    LOW: tl.constexpr = 2 if GROUPS > 1 else 1
    MIDDLE: tl.constexpr = 4 if GROUPS > 4 else 1
    high = tl.arange(0, GROUPS // (LOW * MIDDLE)).to(tl.int64)[None, :, None, None, None, None]
    middle = tl.arange(0, MIDDLE)[None, None, :, None, None, None]
    vector = tl.arange(0, 4)[None, None, None, :, None, None]
    low = tl.arange(0, LOW)[None, None, None, None, :, None]
    step = tl.arange(0, 4)[None, None, None, None, None, :]
    return ((GROUPS - 1) * 16 - low * 16 - middle * (16 * LOW) + vector * 4 + step) - high * (16 * LOW * MIDDLE)


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
    """Read a tile: which steps count (all bits or none), their rewards, mean and deviation over M critics.

    Rewards are as they are found, masked ones included; mean and deviation of masked steps are 0.
    """
    inside = (row < b) & (time < t)
    row = row.to(tl.int64)
    time = time.to(tl.int64)
    count = tl.load(mask + row * mask_b + time * mask_t, mask=inside, other=0).to(tl.int32)
    bits = (count + 0x7FFFFFFF) >> 31  # a byte other than 0 is True, whatever it holds
    r = tl.load(reward + row * reward_b + time * reward_t, mask=inside).to(tl.float32)
    at = value + row * value_b + time * value_t
    first = kept(bits, tl.load(at, mask=inside).to(tl.float32))
    if M == 2:
        gap = kept(bits, tl.load(at + value_k, mask=inside).to(tl.float32)) - first
        mean = tl.fma(gap, 0.5, first)
        std = 0.5 * tl.abs(gap)
    else:
        shift = tl.zeros_like(first)
        squares = tl.zeros_like(first)
        for k in tl.static_range(1, M):
            at += value_k
            v = kept(bits, tl.load(at, mask=inside).to(tl.float32))
            shift, squares = add_critic(k, v - first, shift, squares)
        mean = first + shift
        std = tl.sqrt(squares / M)
    return bits, r, mean, std


@triton.jit
def next_values(bits, mean, carry, number):
    """The mean of the next valid step after each step, where ``carry`` is that after the tile; and the next carry.

    Of pieces, as they come out.
    """
    found = tl.full(mean[0].shape, float("nan"), tl.float32)
    for j in tl.static_range(15, -1, -1):
        found = chosen(bits[j], mean[j], found)
    found = tl.where((number == 0) & (found != found), carry, found)
    x, known = before_and_with(tl.associative_scan(after_each(float("nan"), found), 1, first_known))
    x = tl.where(number == 0, carry, x)
    following = (x,)
    for j in tl.static_range(15, 0, -1):
        x = chosen(bits[j], mean[j], x)
        following = (x,) + following  # noqa: RUF005 (Triton unpacks no tuple)
    return following, of_the_last(known)


@triton.jit
def whole(c, d):
    """What a group does: c and d of its map."""
    all_c = c[15]
    all_d = d[15]
    for j in tl.static_range(14, -1, -1):
        all_c *= c[j]
        all_d = tl.fma(c[j], all_d, d[j])
    return all_c, all_d


@triton.jit
def walk(c, d, after):
    """Advantages of a group's steps."""
    a = tl.fma(c[15], after, d[15])
    walked = (a,)
    for j in tl.static_range(14, -1, -1):
        a = tl.fma(c[j], a, d[j])
        walked = (a,) + walked  # noqa: RUF005 (likewise)
    return walked


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
    ones = tl.full((1, GROUPS, 16), 1.0, tl.float32)
    rows = row + tl.arange(0, 1)[:, None]
    decay = row_decay(row_lam, rows, b, gamma, decay)
    value_decay = row_decay(None, rows, b, gamma, value_decay)
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
        bits, r, mean, _ = read_steps(
            value, reward, mask, rows[:, :, None], time, b, t, value_k, value_b, value_t, reward_b, reward_t, mask_b,
            mask_t, M,
        )  # fmt: skip
        following, value_after = next_values(in_pieces(bits), in_pieces(mean), value_after, number)
        following = in_one(following)
        is_open = (bits != 0) & (following != following) & (mean == mean)
        last_r += tl.sum(tl.sum(tl.where(is_open, r, 0.0), 2), 1, keep_dims=True)
        last_m += tl.sum(tl.sum(tl.where(is_open, mean, 0.0), 2), 1, keep_dims=True)
        bits = tl.where(is_open, 0, bits)
        d = in_pieces(kept(bits, (r + gamma * following) - mean))
        c1, d1 = whole(in_pieces(chosen(bits, decay[:, :, None], ones)), d)
        c2, d2 = whole(in_pieces(chosen(bits, value_decay[:, :, None], ones)), d)
        c1, d1, c2, d2 = tl.associative_scan((c1, d1, c2, d2), 1, compose)
        e1, f1, e2, f2 = compose(e1, f1, e2, f2, of_the_last(c1), of_the_last(d1), of_the_last(c2), of_the_last(d2))
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
    before, known = before_and_with(tl.associative_scan(after_each(float("nan"), known), 1, first_known))
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
    ones = tl.full((ROWS, GROUPS, 16), 1.0, tl.float32)
    out_rows = rows[:, :, None, None, None, None]
    out_step = stored_steps(GROUPS)
    decay = row_decay(row_lam, rows, b, gamma, decay)
    value_decay = row_decay(None, rows, b, gamma, value_decay)
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
        first = start + (blocks - 1 - i) * BLOCK_T
        bits, r, mean, std = read_steps(
            value, reward, mask, rows[:, :, None], first + step, b, t, value_k, value_b, value_t, reward_b, reward_t,
            mask_b, mask_t, M,
        )  # fmt: skip
        at = out_rows.to(tl.int64) * t + first + out_step
        inside = (out_rows < b) & (first + out_step.to(tl.int32) < t)
        tl.store(mean_out + at, as_stored(mean), mask=inside)
        tl.store(std_out + at, as_stored(std), mask=inside)
        following, value_after = next_values(in_pieces(bits), in_pieces(mean), value_after, number)
        d = in_pieces(kept(bits, (r + gamma * in_one(following)) - mean))
        c1 = in_pieces(chosen(bits, decay[:, :, None], ones))
        c2 = in_pieces(chosen(bits, value_decay[:, :, None], ones))
        e1, f1 = whole(c1, d)
        e2, f2 = whole(c2, d)
        e1, f1, e2, f2 = tl.associative_scan(
            (after_each(1.0, e1), after_each(0.0, f1), after_each(1.0, e2), after_each(0.0, f2)), 1, compose
        )
        d1 = walk(c1, d, tl.fma(before_and_with(e1)[0], after1, before_and_with(f1)[0]))
        after1 = of_the_last(d1[0])
        tl.store(advantage + at, as_stored(kept(bits, in_one(d1))), mask=inside)
        d2 = walk(c2, d, tl.fma(before_and_with(e2)[0], after2, before_and_with(f2)[0]))
        after2 = of_the_last(d2[0])
        tl.store(returns + at, as_stored(kept(bits, in_one(d2) + mean)), mask=inside)
