"""What the Triton kernels of the policy head share: one program owns one row of logits and passes over it twice.

The passes are as few instructions a logit as keep its digits, so that a program is small and a multiprocessor holds
several, each of which loads while another computes or reduces; no block is loaded ahead of its turn. Rows lie ``pitch``
elements apart, a multiple of 16, so that every access is 16 bytes wide whatever the size of the vocabulary; what lies
between ``n_columns`` and ``pitch`` is loaded and stored with the last block of a row, and counts for nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asyppo_kernels._gemm import mm_into
from asyppo_kernels._policy_head import HeadOptions

MAX_BLOCK = 8192
COLUMNS_PER_THREAD = 32
LOWEST = tl.constexpr(-1e20)  # stands in for -inf: 2 to the power of both is 0, but 0 * -inf is NaN
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
GROUP = tl.constexpr(16)  # logits of a block that share a maximum: the more, the less it costs


class HeadScalars(NamedTuple):
    """The numbers of ``HeadOptions`` as kernels take them."""

    inv_temperature: float
    softcap: float
    inv_softcap: float

    @classmethod
    def of(cls, options: HeadOptions) -> HeadScalars:
        """1 for a softcap that is not there: the kernel does not read it."""
        softcap = 1.0 if options.softcap is None else options.softcap
        return cls(1.0 / options.temperature, softcap, 1.0 / softcap)


class Workspace:
    """Memory for the logits of some rows and, over them where they fit, the gradient of the loss with respect to them.

    A gradient of the logits' own dtype replaces them element by element. A bfloat16 gradient goes over the back half of
    its own float32 row, which ``write_gradient`` walks backwards in blocks of B columns. Block i from the end starts at
    column c(i) = c(0) - iB, and its gradient overwrites logits from column (pitch + c(i)) / 2 > (c(0) + c(i)) / 2 on.
    Once all threads of the program have loaded block k, logits from c(k) on are free; so they may write blocks up to
    i = 2k before they have to meet again. They meet at k = 0, 1, 3, 7, and so on.
    """

    def __init__(self, hidden: Tensor, options: HeadOptions, lines: int, length: int, *, gradient: bool) -> None:
        self.pitch = padded(length)
        self.dtype, self.gradient_dtype = options.logits_dtype, gradient_dtype(hidden)
        self.buffer = hidden.new_empty(lines, self.pitch, dtype=self.dtype)
        self.overlaps = self.gradient_dtype.itemsize < self.dtype.itemsize
        if not gradient:
            self.gradient_buffer = self.buffer
        elif self.overlaps:
            self.gradient_buffer = self.buffer.view(self.gradient_dtype)[:, self.pitch :]
        elif self.gradient_dtype == self.dtype:
            self.gradient_buffer = self.buffer
        else:
            self.gradient_buffer = hidden.new_empty(lines, self.pitch, dtype=self.gradient_dtype)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The products of these rows with this slice of the vocabulary, [n, columns]; bias and softcap to come."""
        z = self.buffer[: len(hidden), : len(weight)]
        mm_into(z, hidden, weight.t())
        return z

    def gradient(self, z: Tensor) -> Tensor:
        """Where the gradient of these logits goes, of their shape."""
        return self.gradient_buffer[: z.shape[0], : z.shape[1]]


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """What a gradient of the logits is stored in; float16 would flush a probability times 1/batch to 0."""
    return torch.bfloat16 if hidden.dtype == torch.bfloat16 else torch.float32


def padded(length: int) -> int:
    """``length`` rounded up to where a row of any dtype starts on 16 bytes."""
    return -(-length // 16) * 16


def bytes_per_logit(hidden: Tensor, options: HeadOptions, *, gradient: bool) -> int:
    """What an element of ``Workspace`` takes."""
    stored, formed = options.logits_dtype.itemsize, gradient_dtype(hidden).itemsize
    return stored + formed if gradient and formed > stored else stored


def launch_shape(n_columns: int, *, softcap: bool) -> tuple[int, int]:
    """(columns a block, warps a program): 32 columns a thread, half as many where each of them takes a tanh, since
    more would cost registers that another program could use."""
    columns = COLUMNS_PER_THREAD // 2 if softcap else COLUMNS_PER_THREAD
    limit = MAX_BLOCK // 2 if softcap else MAX_BLOCK
    block = min(max(triton.next_power_of_2(n_columns), 32), limit)
    return block, max(block // (32 * columns), 1)


@triton.jit
def tanh_and_slope(power):
    """tanh y and (1 - tanh^2 y) / 4, each to a few roundings of itself, where exp(2 y) is 2^power; NaN stays NaN."""
    # At 2^126, the largest whose reciprocal is a normal number, the slope is nothing beside any gradient.
    exp = tl.exp2(tl.minimum(power, 126.0, propagate_nan=tl.PropagateNan.ALL))
    root = tl.rsqrt(exp + 1.0)
    inverse = root * root
    inverse -= inverse * tl.fma(exp + 1.0, inverse, -1.0)  # a Newton step, since the square doubles the root's error
    # 1 - 2 / (exp + 1) loses digits near 0: there, a minimax polynomial, to 1e-8 of tanh y.
    square = power * power
    series = tl.fma(square, -3.0162411e-5, 6.6564109e-4)
    series = tl.fma(square, tl.fma(square, series, -0.013875873), 0.34657359)
    tanh = tl.where(tl.abs(power) < 0.86, power * series, tl.fma(inverse, -2.0, 1.0))
    return tanh, exp * inverse * inverse


@triton.jit
def capped(raw, bias_ptr, columns, mask, inv_softcap, SOFTCAP: tl.constexpr):
    """(x, a quarter of the softcap's slope) of products as they were stored; a logit is x times ``logit_scale``.

    Without a softcap x is product + bias and the second is 1; NaN stays NaN. ``mask`` None: all columns are there.
    """
    x = raw.to(tl.float32)
    if bias_ptr is not None:
        if mask is None:
            x += tl.load(bias_ptr + columns).to(tl.float32)
        else:
            x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        x, slope = tanh_and_slope(x * (inv_softcap * (2.0 * LOG2_E)))
    return x, slope


@triton.jit
def logit_scale(inv_temperature, softcap, SOFTCAP: tl.constexpr):
    """What ``capped`` leaves out of a logit."""
    scale = inv_temperature
    if SOFTCAP:
        scale *= softcap
    return scale


@triton.jit
def log2_gap(x, scale, offset, FINITE: tl.constexpr):
    """x scale + offset in one rounding, so exact to a rounding of the gap itself, however large both are.

    Unless FINITE, x may be -inf (a banned token, or no token at all), and then the gap is LOWEST.
    """
    gap = tl.fma(x, scale, offset)
    if not FINITE:
        gap = tl.maximum(gap, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    return gap


@triton.jit
def rounded(x, y):
    """x y, which no compiler fuses with the sum it goes into: a difference of equal products is 0."""
    return tl.fma(x, y, 0.0)


@triton.jit
def add_block(x, scale, offset, total, weighted, VECTOR: tl.constexpr, ENTROPY: tl.constexpr, FINITE: tl.constexpr):
    """The three numbers of each group in ``row_statistics``, with a block of the row added to them.

    A group takes the VECTOR neighbours that a thread loads at once, from as many places of the block as make GROUP:
    all in registers of one thread, which exchanges nothing with others.
    """
    x = tl.reshape(x, [GROUP // VECTOR, x.shape[0] // GROUP, VECTOR])
    lower = tl.minimum(offset, tl.max(tl.max(x, axis=2), axis=0) * -scale)
    gap = log2_gap(x, scale, lower[None, :, None], FINITE)
    exp = tl.exp2(gap)
    step = lower - offset
    shrink = tl.exp2(step)
    if ENTROPY:
        weighted = tl.fma(tl.fma(total, step, weighted), shrink, tl.sum(tl.sum(exp * gap, axis=2), axis=0))
    return lower, tl.fma(total, shrink, tl.sum(tl.sum(exp, axis=2), axis=0)), weighted


@triton.jit
def row_statistics(
    z_row,
    bias_ptr,
    target,
    n_columns,
    pitch,
    inv_temperature,
    softcap,
    inv_softcap,
    ENTROPY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(logprob, entropy, row_max, log_sum) of a row; row_max to a rounding, log_sum is log sum exp(z - row_max).

    Powers are of 2, so that scale and subtraction are one fused multiply-add. Each group of a block keeps minus its
    maximum m (times log2 e), sum 2^(z - m) and sum 2^(z - m) (z - m); they meet once, after the row.
    """
    scale = logit_scale(inv_temperature, softcap, SOFTCAP) * LOG2_E
    # First, since after the last barrier of this function a warp may be ahead and write the gradient over the row.
    target_x, _ = capped(tl.load(z_row + target), bias_ptr, target, None, inv_softcap, SOFTCAP)

    VECTOR: tl.constexpr = 128 // z_row.dtype.element_ty.primitive_bitwidth
    offset = tl.full([BLOCK // GROUP], -LOWEST, tl.float32)
    total = tl.zeros([BLOCK // GROUP], tl.float32)
    weighted = tl.zeros([BLOCK // GROUP], tl.float32)
    lane = tl.arange(0, BLOCK)
    # The last block, the only one that may be less than full.
    last = (tl.cdiv(n_columns, BLOCK) - 1) * BLOCK
    inside = last + lane < n_columns
    raw = tl.load(z_row + last + lane, mask=last + lane < pitch, other=0.0)
    x, _ = capped(raw, bias_ptr, last + lane, inside, inv_softcap, SOFTCAP)
    x = tl.where(inside, x, float("-inf"))
    offset, total, weighted = add_block(x, scale, offset, total, weighted, VECTOR, ENTROPY, False)
    for start in range(0, last, BLOCK):
        raw = tl.load(z_row + start + lane)
        x, _ = capped(raw, bias_ptr, start + lane, None, inv_softcap, SOFTCAP)
        offset, total, weighted = add_block(x, scale, offset, total, weighted, VECTOR, ENTROPY, SOFTCAP)

    lowest = tl.min(offset, axis=0)
    below = lowest - offset
    share = tl.exp2(below)
    whole = tl.sum(total * share, axis=0)
    gap = log2_gap(target_x, scale, lowest, SOFTCAP)
    # A target near the maximum is held against the sum as the very term it is there: one that is alone has log-prob 0,
    # entropy 0 and gradient 0.
    near = gap > -1.0
    base = tl.where(near, gap, 0.0)
    unit = tl.exp2(base)
    log_rest = tl.log(tl.where(whole == unit, 1.0, whole / unit))  # a division by itself may be a rounding off 1
    # Roundings may lift a log-prob above 0, and an entropy below.
    logprob = tl.minimum((gap - base) * LN_2 - log_rest, 0.0, propagate_nan=tl.PropagateNan.ALL)
    entropy = log_rest
    if ENTROPY:
        entropy += (rounded(base, whole) - tl.sum(tl.fma(total, below, weighted) * share, axis=0)) * LN_2 / whole
        entropy = tl.maximum(entropy, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # ``write_gradient`` has the gaps from row_max, and the log-prob from a gap and log_sum.
    row_max = lowest * -LN_2
    row_offset = row_max * -LOG2_E
    from_target = rounded(log2_gap(target_x, scale, row_offset, SOFTCAP), LN_2) - logprob
    log_sum = tl.where(near, from_target, log_rest + (row_offset - lowest) * LN_2)
    return logprob, entropy, row_max, log_sum


@triton.jit
def write_gradient(
    z_row,
    grad_row,
    bias_ptr,
    target_column,
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
    SOFTCAP: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient with respect to hidden weight^T + bias of a row, or of a slice of it, given those of its statistics.

    With log p = z - row_max - log_sum:  d logprob / d z_j = [j is the target] - p_j,  d H / d z_j = -p_j (log p_j + H).
    In terms of gap = (z - row_max) log2 e both are 2^gap (slant gap + level), but for the target, which is put right by
    one store after the row. Backwards: the end of the row, read last, is what the cache still holds, and ``Workspace``
    says what it allows.
    """
    scale = logit_scale(inv_temperature, softcap, SOFTCAP) * LOG2_E
    offset = row_max * -LOG2_E
    unit = inv_temperature
    if SOFTCAP:
        unit *= 4.0  # ``capped`` gives a quarter of the slope
    grad_logprob *= unit
    grad_entropy *= unit
    inverse = tl.exp(-log_sum)
    slant = -LN_2 * grad_entropy * inverse
    level = (grad_entropy * (log_sum - entropy) - grad_logprob) * inverse

    has_target = (target_column >= 0) & (target_column < n_columns)
    raw_target = tl.load(z_row + target_column, mask=has_target, other=0.0)
    lane = tl.arange(0, BLOCK)
    n_full = tl.cdiv(n_columns, BLOCK) - 1
    last = n_full * BLOCK
    inside = last + lane < n_columns
    raw = tl.load(z_row + last + lane, mask=last + lane < pitch, other=0.0)
    tl.debug_barrier()  # all have loaded the last block and the target
    x, slope = capped(raw, bias_ptr, last + lane, inside, inv_softcap, SOFTCAP)
    gap = log2_gap(tl.where(inside, x, float("-inf")), scale, offset, False)
    grad = tl.exp2(gap) * tl.fma(gap, slant, level) * slope
    tl.store(grad_row + last + lane, grad.to(grad_row.dtype.element_ty), mask=last + lane < pitch)
    for i in range(1, n_full + 1):
        start = last - i * BLOCK
        raw = tl.load(z_row + start + lane)
        if OVERLAPS:  # noqa: SIM102 (a constant, and a number of the loop)
            if (i & (i + 1)) == 0:
                tl.debug_barrier()
        x, slope = capped(raw, bias_ptr, start + lane, None, inv_softcap, SOFTCAP)
        gap = log2_gap(x, scale, offset, SOFTCAP)
        grad = tl.exp2(gap) * tl.fma(gap, slant, level) * slope
        tl.store(grad_row + start + lane, grad.to(grad_row.dtype.element_ty))

    tl.debug_barrier()  # the store below comes after that of the target's block
    x, slope = capped(raw_target, bias_ptr, target_column, has_target, inv_softcap, SOFTCAP)
    logprob = rounded(log2_gap(x, scale, offset, SOFTCAP), LN_2) - log_sum
    logprob = tl.minimum(logprob, 0.0, propagate_nan=tl.PropagateNan.ALL)
    prob = tl.exp(logprob)
    grad = (grad_logprob * (1.0 - prob) - grad_entropy * prob * (logprob + entropy)) * slope
    tl.store(grad_row + target_column, grad.to(grad_row.dtype.element_ty), mask=has_target)


@triton.jit
def write_zeros(grad_row, n_columns, pitch, BLOCK: tl.constexpr):
    """A row whose gradient is zero is not read."""
    zeros = tl.zeros([BLOCK], grad_row.dtype.element_ty)
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(grad_row + columns, zeros, mask=columns < pitch)
