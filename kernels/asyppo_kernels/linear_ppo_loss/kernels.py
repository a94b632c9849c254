"""The Triton kernels: one clears the numbers of the rows and what will hold their results, one goes from a chunk of
logits to losses, statistics and the gradient of the logits."""

from __future__ import annotations

import triton
import triton.language as tl

from asyppo_kernels._policy_head import IGNORE_TARGET
from asyppo_kernels._policy_head_kernels import row_statistics, write_gradient, write_zeros

LOG_RATIO_LIMIT = tl.constexpr(20.0)
NO_TARGET = tl.constexpr(IGNORE_TARGET)


@triton.jit(do_not_specialize=["n_rows"])
def rows_kernel(
    target_ptr,  # [N], as all inputs; None: not given
    old_logprob_ptr,
    ref_logprob_ptr,  # None: the loss has no KL term
    advantage_ptr,
    rollout_weight_ptr,
    token_weight_ptr,
    advantage_keep_ptr,
    entropy_keep_ptr,
    cleared_target_ptr,  # [N]
    numbers_ptr,  # [5, pitch]: old log-prob, if there is one, reference log-prob, advantage, rollout and token weight
    flags_ptr,  # [4, pitch]: counted, surrogate_on, entropy_on, live
    loss_ptr,  # [N], as the four after it: results of ``loss_kernel``, which does not write all of them
    logprob_ptr,
    entropy_ptr,
    ratio_ptr,
    clipped_ptr,
    index_ptr,  # [2, pitch]: the rows that are live, and those that only count; None: not wanted, else for one program
    count_ptr,  # [2]: how many of each
    n_rows,
    pitch,
    ENTROPY: tl.constexpr,  # the loss moves with it
    BLOCK: tl.constexpr,
):
    """``Rows`` of what was given, and zeros in the results: a block of rows a program, and others if the grid is too
    small for all."""
    # Apart from the rest, which with all these pointers at once would spill on gfx942.
    for start in range(tl.program_id(0) * BLOCK, n_rows, tl.num_programs(0) * BLOCK):
        row = start + tl.arange(0, BLOCK)
        zero = tl.zeros([BLOCK], tl.float32)
        tl.store(loss_ptr + row, zero, mask=row < n_rows)
        tl.store(logprob_ptr + row, zero, mask=row < n_rows)
        tl.store(entropy_ptr + row, zero, mask=row < n_rows)
        tl.store(ratio_ptr + row, zero, mask=row < n_rows)
        tl.store(clipped_ptr + row, zero.to(tl.uint8), mask=row < n_rows)

    n_live = 0
    n_dead = 0
    for start in range(tl.program_id(0) * BLOCK, n_rows, tl.num_programs(0) * BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < n_rows
        w = tl.load(token_weight_ptr + row, mask=inside, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + row, mask=inside, other=0)
        a = tl.load(advantage_ptr + row, mask=inside, other=0.0).to(tl.float32)
        counted = (w != 0.0) & (target != NO_TARGET)
        advantage_on = counted
        if advantage_keep_ptr is not None:
            advantage_on = counted & (tl.load(advantage_keep_ptr + row, mask=inside, other=0) != 0)
        u = tl.full([BLOCK], 1.0, tl.float32)
        if rollout_weight_ptr is not None:
            u = tl.load(rollout_weight_ptr + row, mask=inside, other=0.0).to(tl.float32)
        a = tl.where(advantage_on, a, 0.0)
        u = tl.where(advantage_on, u, 0.0)
        surrogate_on = a * u != 0.0
        entropy_on = counted & ENTROPY
        if ENTROPY and entropy_keep_ptr is not None:
            entropy_on = counted & (tl.load(entropy_keep_ptr + row, mask=inside, other=0) != 0)
        live = surrogate_on | entropy_on
        ref = tl.zeros([BLOCK], tl.float32)
        if ref_logprob_ptr is not None:
            live = counted
            ref = tl.load(ref_logprob_ptr + row, mask=inside, other=0.0).to(tl.float32)
        if old_logprob_ptr is not None:
            old = tl.load(old_logprob_ptr + row, mask=inside, other=0.0).to(tl.float32)
            tl.store(numbers_ptr + row, tl.where(counted, old, 0.0), mask=inside)

        tl.store(cleared_target_ptr + row, tl.where(counted, target, 0), mask=inside)
        tl.store(numbers_ptr + pitch + row, tl.where(counted, ref, 0.0), mask=inside)
        tl.store(numbers_ptr + 2 * pitch + row, a, mask=inside)
        tl.store(numbers_ptr + 3 * pitch + row, u, mask=inside)
        tl.store(numbers_ptr + 4 * pitch + row, tl.where(counted, w, 0.0), mask=inside)
        tl.store(flags_ptr + row, counted.to(tl.uint8), mask=inside)
        tl.store(flags_ptr + pitch + row, surrogate_on.to(tl.uint8), mask=inside)
        tl.store(flags_ptr + 2 * pitch + row, entropy_on.to(tl.uint8), mask=inside)
        tl.store(flags_ptr + 3 * pitch + row, live.to(tl.uint8), mask=inside)

        if index_ptr is not None:
            dead = counted & (live == 0)
            ones = live.to(tl.int32) + (dead.to(tl.int32) << 16)  # two counts in one scan; BLOCK is below 2^16
            before = tl.cumsum(ones, axis=0) - ones
            tl.store(index_ptr + n_live + (before & 0xFFFF), row.to(tl.int64), mask=live)
            tl.store(index_ptr + pitch + n_dead + (before >> 16), row.to(tl.int64), mask=dead)
            total = tl.sum(ones, axis=0)
            n_live += total & 0xFFFF
            n_dead += total >> 16
    if index_ptr is not None:
        tl.store(count_ptr, n_live)
        tl.store(count_ptr + 1, n_dead)


@triton.jit
def bounded_log_ratio(x):
    """``x`` in [-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT]; NaN stays NaN."""
    return tl.where(x > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, tl.where(x < -LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, x))


@triton.jit
def exp_minus_line(x):
    """exp(x) - x - 1, to a few roundings of itself where x is near 0."""
    series = 0.5 + x * (
        1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320 + x * (1 / 362880))))))
    )
    return tl.where(tl.abs(x) < 0.5, x * x * series, tl.exp(x) - x - 1.0)


@triton.jit(do_not_specialize=["first_row"])
def loss_kernel(
    z_ptr,  # [programs, pitch]
    grad_ptr,  # [programs, grad_pitch], over z or elsewhere
    index_ptr,  # [programs] int64: the row of each program; None: first_row and on
    target_ptr,  # [N], as all numbers of a row; cleared where they do not count
    old_logprob_ptr,  # None: the row's own
    ref_logprob_ptr,
    advantage_ptr,
    rollout_weight_ptr,
    token_weight_ptr,
    entropy_on_ptr,
    bias_ptr,
    loss_ptr,  # [N], as all outputs; zero before, as they stay where no program writes
    logprob_ptr,
    entropy_ptr,
    ratio_ptr,
    clipped_ptr,
    first_row,
    n_columns,
    pitch,
    grad_pitch,
    inv_temperature,
    softcap,
    inv_softcap,
    ratio_low,
    ratio_high,
    dual_clip,
    entropy_coef,
    kl_coef,
    SOFTCAP: tl.constexpr,
    DUAL_CLIP: tl.constexpr,
    KL: tl.constexpr,
    KL_BIAS_CORRECTION: tl.constexpr,
    DEAD_ROW_STATS: tl.constexpr,
    GRADIENT: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row a program: statistics, share of the loss, and with GRADIENT the gradient of that in hidden weight^T."""
    program = tl.program_id(0).to(tl.int64)
    row = first_row + program
    if index_ptr is not None:
        row = tl.load(index_ptr + program)
    z_row = z_ptr + program * pitch
    grad_row = grad_ptr + program * grad_pitch

    w = tl.load(token_weight_ptr + row)
    a = tl.load(advantage_ptr + row)
    u = tl.load(rollout_weight_ptr + row)
    target = tl.load(target_ptr + row)
    entropy_on = tl.load(entropy_on_ptr + row) != 0
    surrogate_on = a * u != 0.0
    computed = w != 0.0
    if not DEAD_ROW_STATS and not KL:
        computed = surrogate_on | entropy_on

    grad_logprob = 0.0 * w
    grad_entropy = 0.0 * w
    row_max = 0.0 * w
    log_sum = 0.0 * w
    entropy = 0.0 * w
    if computed:
        logprob, entropy, row_max, log_sum = row_statistics(
            z_row,
            bias_ptr,
            target,
            n_columns,
            pitch,
            inv_temperature,
            softcap,
            inv_softcap,
            ENTROPY=True,
            SOFTCAP=SOFTCAP,
            BLOCK=BLOCK,
        )
        log_ratio = logprob - logprob  # 0, or NaN
        if old_logprob_ptr is not None:
            log_ratio = logprob - tl.load(old_logprob_ptr + row)
        ratio = tl.exp(bounded_log_ratio(log_ratio))
        inside = tl.where(ratio > ratio_high, ratio_high, tl.where(ratio < ratio_low, ratio_low, ratio))
        surrogate = tl.minimum(ratio * a, inside * a, propagate_nan=tl.PropagateNan.ALL)
        clipped = tl.where(a > 0.0, ratio > ratio_high, ratio < ratio_low)
        if DUAL_CLIP:
            surrogate = tl.where((a < 0.0) & (surrogate < dual_clip * a), dual_clip * a, surrogate)
            clipped = clipped | ((a < 0.0) & (ratio > dual_clip))
        clamped = tl.abs(log_ratio) > LOG_RATIO_LIMIT
        clipped = (clipped | clamped) & (a != 0.0)

        loss = tl.where(surrogate_on, -u * surrogate, 0.0) - tl.where(entropy_on, entropy_coef * entropy, 0.0)
        grad_logprob = tl.where(surrogate_on & (clipped == 0), -u * a * ratio, 0.0)
        grad_entropy = tl.where(entropy_on, -entropy_coef * w, 0.0)
        if KL:
            log_ref_ratio = tl.load(ref_logprob_ptr + row) - logprob
            bounded = bounded_log_ratio(log_ref_ratio)
            k3 = exp_minus_line(bounded)
            moves = tl.abs(log_ref_ratio) <= LOG_RATIO_LIMIT
            slope = tl.where(moves, -(k3 + bounded), 0.0)
            if KL_BIAS_CORRECTION:  # the sum of slope and k3 is -bounded, and would lose its digits
                slope = ratio * tl.where(clamped, slope, tl.where(moves, -bounded, k3))
                k3 *= ratio
            loss += kl_coef * k3
            grad_logprob += kl_coef * slope
        grad_logprob *= w
        tl.store(loss_ptr + row, w * loss)
        tl.store(logprob_ptr + row, logprob)
        tl.store(entropy_ptr + row, entropy)
        tl.store(ratio_ptr + row, ratio)
        tl.store(clipped_ptr + row, clipped.to(tl.uint8))

    if GRADIENT:
        if (grad_logprob != 0.0) | (grad_entropy != 0.0):
            write_gradient(
                z_row,
                grad_row,
                bias_ptr,
                target,
                n_columns,
                pitch,
                row_max,
                log_sum,
                entropy,
                grad_logprob,
                grad_entropy,
                inv_temperature,
                softcap,
                inv_softcap,
                SOFTCAP=SOFTCAP,
                OVERLAPS=OVERLAPS,
                BLOCK=BLOCK,
            )
        else:
            write_zeros(grad_row, n_columns, pitch, BLOCK=BLOCK)
