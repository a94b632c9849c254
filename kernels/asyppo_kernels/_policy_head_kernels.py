"""What the Triton kernels of the policy head share: one program owns one row of logits and passes over it twice.

A row is read in blocks, two ahead of the arithmetic: the assembler moves a load to the end of its iteration, so that
one block ahead would have nothing to wait behind. Rows lie ``pitch`` elements apart, a
multiple of 16, so that every access is 16 bytes wide whatever the size of the vocabulary; what lies between
``n_columns`` and ``pitch`` is loaded and stored with the rest, and counts for nothing.
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
ELEMENTS_PER_THREAD = 16
LOWEST = tl.constexpr(-1e20)  # stands in for a logit of -inf: exp of both is 0, but 0 * -inf is NaN


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
    its own float32 row: a kernel that walks the row backwards in blocks of B columns has, when it writes columns jB
    and on, bytes 2 pitch + 2jB and on, already read all columns from jB on, bytes 4jB and on, and as jB <= pitch no
    byte is written that is still to be read. One barrier a block keeps the threads of the program together.
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


def launch_shape(n_columns: int) -> tuple[int, int]:
    """(columns a block, warps a program): 16 columns a thread, that is 64 bytes in flight."""
    block = min(max(triton.next_power_of_2(n_columns), 32), MAX_BLOCK)
    return block, min(max(block // (32 * ELEMENTS_PER_THREAD), 1), 16)


@triton.jit
def tanh_and_slope(x):
    """tanh x and 1 - tanh^2 x, each to a few roundings of itself, at any x."""
    rest = 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)  # 1 - |tanh x|
    square = x * x
    series = 1.0 + square * (
        -0.33333333333 + square * (0.13333333333 + square * (-0.05396825397 + square * 0.02186948854))
    )
    far = tl.where(x < 0.0, rest - 1.0, 1.0 - rest)
    return tl.where(tl.abs(x) < 0.3, x * series, far), rest * (2.0 - rest)


@triton.jit
def logit(raw, bias_ptr, columns, n_columns, inv_temperature, softcap, inv_softcap, SOFTCAP: tl.constexpr):
    """(z, slope of the softcap) of products as they were stored, and LOWEST beyond the vocabulary; NaN stays NaN."""
    x = raw.to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        x, slope = tanh_and_slope(x * inv_softcap)
        x *= softcap
    x *= inv_temperature
    return tl.where((columns >= n_columns) | (x < LOWEST), LOWEST, x), slope


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
    """(logprob, entropy, row_max, log_sum) of a row; log_sum is log sum exp(z - row_max).

    Each position of the block keeps a maximum, a sum and a weighted sum of its own; they meet once, after the row.
    """
    lane = tl.arange(0, BLOCK)
    # First, since after the last barrier of this function a warp may be ahead and write the gradient over the row.
    raw_target = tl.load(z_row + target)
    peak = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    ahead = tl.load(z_row + lane, mask=lane < pitch, other=0.0)
    further = tl.load(z_row + BLOCK + lane, mask=BLOCK + lane < pitch, other=0.0)
    for start in range(0, n_columns, BLOCK):
        columns = start + lane
        raw = ahead
        ahead = further
        further = tl.load(z_row + columns + 2 * BLOCK, mask=columns + 2 * BLOCK < pitch, other=0.0)
        z, _ = logit(raw, bias_ptr, columns, n_columns, inv_temperature, softcap, inv_softcap, SOFTCAP)
        # Either the sums shrink to a higher peak, or the new term is below the peak: one exponential.
        gap = z - peak
        shrink = tl.exp(-tl.abs(gap))
        if ENTROPY:
            weighted = tl.where(gap > 0.0, (weighted - total * gap) * shrink, weighted + gap * shrink)
        total = tl.where(gap > 0.0, total * shrink + 1.0, total + shrink)
        peak = tl.where(gap > 0.0, z, peak)

    # A position that met no logit may have counted exp(LOWEST - LOWEST) = 1; exp(LOWEST - row_max) = 0 takes it out.
    row_max = tl.max(peak, axis=0)
    below = peak - row_max
    scale = tl.exp(below)
    whole = tl.sum(total * scale, axis=0)
    log_sum = tl.maximum(tl.log(whole), 0.0, propagate_nan=tl.PropagateNan.ALL)
    entropy = log_sum
    if ENTROPY:
        entropy = log_sum - tl.sum((weighted + total * below) * scale, axis=0) / whole
    z, _ = logit(raw_target, bias_ptr, target, n_columns, inv_temperature, softcap, inv_softcap, SOFTCAP)
    # Fused multiply-adds may round the target's logit to just above the maximum that it is.
    logprob = tl.minimum(z - row_max, 0.0, propagate_nan=tl.PropagateNan.ALL) - log_sum
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
    Backwards: the end of the row, read last, is what the cache still holds, and ``Workspace`` says what it allows.
    """
    lane = tl.arange(0, BLOCK)
    grad_logprob *= inv_temperature
    grad_entropy *= inv_temperature
    n_blocks = tl.cdiv(n_columns, BLOCK)
    last = (n_blocks - 1) * BLOCK
    ahead = tl.load(z_row + last + lane, mask=last + lane < pitch, other=0.0)
    further = tl.load(z_row + last - BLOCK + lane, mask=last + lane >= BLOCK, other=0.0)
    for i in range(n_blocks):
        columns = last - i * BLOCK + lane
        raw = ahead
        ahead = further
        further = tl.load(z_row + columns - 2 * BLOCK, mask=columns >= 2 * BLOCK, other=0.0)
        if OVERLAPS:
            tl.debug_barrier()
        z, slope = logit(raw, bias_ptr, columns, n_columns, inv_temperature, softcap, inv_softcap, SOFTCAP)
        log_p = z - row_max - log_sum
        grad = -tl.exp(log_p) * (grad_logprob + grad_entropy * (log_p + entropy))
        grad = tl.where(columns == target_column, grad + grad_logprob, grad)
        if SOFTCAP:
            grad *= slope
        tl.store(grad_row + columns, grad.to(grad_row.dtype.element_ty), mask=columns < pitch)


@triton.jit
def write_zeros(grad_row, n_columns, pitch, BLOCK: tl.constexpr):
    """A row whose gradient is zero is not read."""
    zeros = tl.zeros([BLOCK], grad_row.dtype.element_ty)
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(grad_row + columns, zeros, mask=columns < pitch)
