"""The Triton kernels of ``ensemble_value``."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_critic(k: tl.constexpr, offset, shift, squares):
    """Take critic ``k`` >= 1 into the running mean ``shift`` and sum of squared deviations of the offsets (Welford).

    An offset is a value less critic 0's, which loses nothing to cancellation where values are large beside their
    spread. Where all critics agree both stay exactly 0, and the sum cannot become negative.
    """
    before = offset - shift
    shift += before * (1.0 / (k + 1))
    return shift, squares + before * (offset - shift)


@triton.jit
def forward_kernel(
    hidden,
    weight,
    bias,
    value,
    mean,
    std,
    n,
    h,
    hidden_k,
    hidden_n,
    hidden_h,
    weight_k,
    weight_h,
    bias_k,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A program owns BLOCK_N rows of all M critics: their values, and mean and standard deviation over the critics."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = row < n
    first = tl.zeros((BLOCK_N,), tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for k in tl.static_range(M):
        hidden_row = hidden + row[:, None] * hidden_n
        products = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        for start in range(0, h, BLOCK_H):
            column = start + tl.arange(0, BLOCK_H)
            in_columns = column < h
            w = tl.load(weight + k * weight_k + column * weight_h, mask=in_columns, other=0.0).to(tl.float32)
            x = tl.load(
                hidden_row + column[None, :].to(tl.int64) * hidden_h,
                mask=in_rows[:, None] & in_columns[None, :],
                other=0.0,
            )
            products += x.to(tl.float32) * w[None, :]
        score = tl.sum(products, axis=1)
        if bias is not None:
            score += tl.load(bias + k * bias_k).to(tl.float32)
        tl.store(value + row, score, mask=in_rows)
        hidden += hidden_k
        value += n
        if k == 0:
            first = score
        else:
            shift, squares = add_critic(k, score - first, shift, squares)
    tl.store(mean + row, first + shift, mask=in_rows)
    tl.store(std + row, tl.sqrt(squares / M), mask=in_rows)


@triton.jit
def backward_kernel(
    grad,
    hidden,
    weight,
    grad_hidden,
    partial,
    n,
    h,
    part_rows,
    grad_k,
    grad_n,
    hidden_k,
    hidden_n,
    hidden_h,
    weight_k,
    weight_h,
    grad_hidden_k,
    grad_hidden_n,
    grad_hidden_h,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A program owns BLOCK_H columns of one critic on one part of the rows.

    It writes the gradient of hidden there (unless ``grad_hidden`` is None), and what the part adds to those of weight
    and, in column h, bias (unless ``partial`` [parts, M, h + 1] is None).
    """
    part = tl.program_id(0)
    k = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_columns = column < h
    offset = column[None, :].to(tl.int64)
    if grad_hidden is not None:
        w = tl.load(weight + k * weight_k + column * weight_h, mask=in_columns, other=0.0).to(tl.float32)
    products = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    upstream = tl.zeros((BLOCK_N,), tl.float32)
    first = part.to(tl.int64) * part_rows
    for start in range(0, part_rows, BLOCK_N):
        row = first + start + tl.arange(0, BLOCK_N)
        in_rows = (row < n) & (start + tl.arange(0, BLOCK_N) < part_rows)
        inside = in_rows[:, None] & in_columns[None, :]
        g = tl.load(grad + k * grad_k + row * grad_n, mask=in_rows, other=0.0)
        if grad_hidden is not None:
            to = grad_hidden + k * grad_hidden_k + row[:, None] * grad_hidden_n + offset * grad_hidden_h
            tl.store(to, (g[:, None] * w[None, :]).to(grad_hidden.dtype.element_ty), mask=inside)
        if partial is not None:
            at = hidden + k * hidden_k + row[:, None] * hidden_n + offset * hidden_h
            products += g[:, None] * tl.load(at, mask=inside, other=0.0).to(tl.float32)
            upstream += g
    if partial is not None:
        line = partial + (part.to(tl.int64) * tl.num_programs(1) + k) * (h + 1)
        tl.store(line + column, tl.sum(products, axis=0), mask=in_columns)
        if tl.program_id(2) == 0:
            tl.store(line + h, tl.sum(upstream, axis=0))


@triton.jit
def add_parts_kernel(
    partial,
    grad_weight,
    grad_bias,
    parts,
    h,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A program adds BLOCK_H columns of one critic over all parts, in the same order whatever the device."""
    k = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    stride = tl.num_programs(0).to(tl.int64) * (h + 1)
    total = tl.zeros((BLOCK_P, BLOCK_H), tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        at = partial + part[:, None] * stride + k * (h + 1) + column[None, :]
        total += tl.load(at, mask=(part < parts)[:, None] & (column <= h)[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    if grad_weight is not None:
        tl.store(grad_weight + k * h + column, result.to(grad_weight.dtype.element_ty), mask=column < h)
    if grad_bias is not None:
        tl.store(grad_bias + k + column * 0, result.to(grad_bias.dtype.element_ty), mask=column == h)
