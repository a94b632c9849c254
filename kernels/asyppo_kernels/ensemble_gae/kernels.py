"""The Triton kernels of ``ensemble_gae``: the recurrence of ``torch_form``, as an associative scan.

A step maps the z after it to its own, z = b + a z', with one (a, b) for each lambda; a masked step is the identity.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from asyppo_kernels.ensemble_value.kernels import add_critic


@triton.jit
def compose(a1, b1, a2, b2, a1_before, b1_before, a2_before, b2_before):
    """Compose the steps from some time on (first arguments) with those right before them."""
    return a1 * a1_before, b1_before + a1_before * b1, a2 * a2_before, b2_before + a2_before * b2


@triton.jit
def compose_and_what_follows(
    a1,
    b1,
    a2,
    b2,
    c1,
    d1,
    c2,
    d2,
    a1_before,
    b1_before,
    a2_before,
    b2_before,
    c1_before,
    d1_before,
    c2_before,
    d2_before,
):
    """As ``compose``; (c, d) composes all steps but the first, which makes the scan exclusive too."""
    return (
        a1 * a1_before, b1_before + a1_before * b1, a2 * a2_before, b2_before + a2_before * b2,
        a1 * c1_before, d1_before + c1_before * b1, a2 * c2_before, d2_before + c2_before * b2,
    )  # fmt: skip


@triton.jit
def scan_from_the_right(a1, b1, a2, b2, axis: tl.constexpr):
    """Compose every step with all that follow it."""
    return tl.associative_scan((a1, b1, a2, b2), axis, compose, reverse=True)


@triton.jit
def column_0(x, step):
    """The first column of a tile."""
    return tl.sum(tl.where(step == 0, x, 0.0), axis=1)


@triton.jit
def read_steps(
    value,
    reward,
    mask,
    row_lam,
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
    gamma,
    lam,
    rest,
    decay,
    value_lam,
    value_rest,
    value_decay,
    K: tl.constexpr,
):
    """Read a tile: which steps count, their rewards, mean and deviation over K critics, and (a, b) for both lambdas."""
    inside = (row < b)[:, None] & (time < t)[None, :]
    if row_lam is not None:
        lam = tl.load(row_lam + row, mask=row < b, other=0.0)[:, None]
        rest = 1 - lam
        decay = gamma * lam
    row = row[:, None].to(tl.int64)
    time = time[None, :].to(tl.int64)
    valid = tl.load(mask + row * mask_b + time * mask_t, mask=inside, other=0) != 0
    r = tl.load(reward + row * reward_b + time * reward_t, mask=inside, other=0.0).to(tl.float32)
    r = tl.where(valid, r, 0.0)
    at = value + row * value_b + time * value_t
    first = tl.where(valid, tl.load(at, mask=inside, other=0.0).to(tl.float32), 0.0)
    shift = tl.zeros_like(first)
    squares = tl.zeros_like(first)
    for k in tl.static_range(1, K):
        at += value_k
        v = tl.where(valid, tl.load(at, mask=inside, other=0.0).to(tl.float32), 0.0)
        shift, squares = add_critic(k, v - first, shift, squares)
    mean = first + shift
    a1 = tl.where(valid, decay, 1.0)
    b1 = tl.where(valid, rest * mean + lam * r, 0.0)
    a2 = tl.where(valid, value_decay, 1.0)
    b2 = tl.where(valid, value_rest * mean + value_lam * r, 0.0)
    return inside, valid, r, mean, tl.sqrt(squares / K), a1, b1, a2, b2


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
    lam,
    rest,
    decay,
    value_lam,
    value_rest,
    value_decay,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A program composes the steps of one row's chunk, walked from the right, into ``summary`` [B, chunks, 4].

    The first chunk has none, since nothing stands before it.
    """
    chunks = tl.num_programs(0) // b + 1
    row = tl.program_id(0) // (chunks - 1)
    chunk = tl.program_id(0) % (chunks - 1) + 1
    start = chunk * span
    step = tl.arange(0, BLOCK_T)
    a1 = tl.full((1,), 1.0, tl.float32)
    b1 = tl.zeros((1,), tl.float32)
    a2 = tl.full((1,), 1.0, tl.float32)
    b2 = tl.zeros((1,), tl.float32)
    blocks = tl.cdiv(tl.minimum(t - start, span), BLOCK_T)
    for i in range(blocks):
        time = start + (blocks - 1 - i) * BLOCK_T + step
        _, _, _, _, _, c1, d1, c2, d2 = read_steps(
            value, reward, mask, row_lam, row + tl.arange(0, 1), time, b, t, value_k, value_b, value_t, reward_b,
            reward_t, mask_b, mask_t, gamma, lam, rest, decay, value_lam, value_rest, value_decay, K,
        )  # fmt: skip
        c1, d1, c2, d2 = scan_from_the_right(c1, d1, c2, d2, 1)
        a1, b1, a2, b2 = compose(
            a1, b1, a2, b2, column_0(c1, step), column_0(d1, step), column_0(c2, step), column_0(d2, step)
        )
    at = summary + (row.to(tl.int64) * chunks + chunk) * 4 + tl.arange(0, 1)
    tl.store(at, a1)
    tl.store(at + 1, b1)
    tl.store(at + 2, a2)
    tl.store(at + 3, b2)


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
    lam,
    rest,
    decay,
    value_lam,
    value_rest,
    value_decay,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """A program owns ROWS rows, walked in blocks from the right, or one chunk of one row where there are summaries."""
    row = (tl.program_id(0) // chunks) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(0) % chunks
    step = tl.arange(0, BLOCK_T)
    z1 = tl.zeros((ROWS,), tl.float32)  # of the step after the block
    z2 = tl.zeros((ROWS,), tl.float32)
    if summary is not None:
        other = tl.arange(0, BLOCK_CHUNKS)
        after = ((other > chunk) & (other < chunks))[None, :]
        maps = summary + (row[:, None].to(tl.int64) * chunks + other[None, :]) * 4
        _, y1, _, y2 = scan_from_the_right(
            tl.load(maps, mask=after, other=1.0),
            tl.load(maps + 1, mask=after, other=0.0),
            tl.load(maps + 2, mask=after, other=1.0),
            tl.load(maps + 3, mask=after, other=0.0),
            1,
        )
        z1 = column_0(y1, other)
        z2 = column_0(y2, other)
    start = chunk * span
    blocks = tl.cdiv(tl.minimum(t - start, span), BLOCK_T)
    for i in range(blocks):
        time = start + (blocks - 1 - i) * BLOCK_T + step
        inside, valid, r, mean, std, a1, b1, a2, b2 = read_steps(
            value, reward, mask, row_lam, row, time, b, t, value_k, value_b, value_t, reward_b, reward_t,
            mask_b, mask_t, gamma, lam, rest, decay, value_lam, value_rest, value_decay, K,
        )  # fmt: skip
        one = tl.full((ROWS, BLOCK_T), 1.0, tl.float32)
        zero = tl.zeros((ROWS, BLOCK_T), tl.float32)
        a1, b1, a2, b2, c1, d1, c2, d2 = tl.associative_scan(
            (a1, b1, a2, b2, one, zero, one, zero), 1, compose_and_what_follows, reverse=True
        )
        next1 = d1 + c1 * z1[:, None]
        next2 = d2 + c2 * z2[:, None]
        z1 = column_0(b1 + a1 * z1[:, None], step)
        z2 = column_0(b2 + a2 * z2[:, None], step)
        at = row[:, None].to(tl.int64) * t + time[None, :]
        tl.store(advantage + at, tl.where(valid, r - mean + gamma * next1, 0.0), mask=inside)
        tl.store(returns + at, tl.where(valid, r + gamma * next2, 0.0), mask=inside)
        tl.store(mean_out + at, mean, mask=inside)
        tl.store(std_out + at, std, mask=inside)
