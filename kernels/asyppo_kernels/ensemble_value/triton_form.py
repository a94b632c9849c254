"""``ensemble_value`` by Triton kernels: one launch forward, at most two backward.

The gradient of weight is a sum over all rows. The rows are cut into parts, so that every multiprocessor reads hidden,
and a second launch adds the parts: no float atomics, and the cut depends on the shape alone, so a result repeats to the
bit on any device. The gradients of hidden and bias ride along in the first launch, which reads the upstream gradient
anyway.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from asyppo_kernels._args import device_guard
from asyppo_kernels.ensemble_value import kernels

TILE = 8192  # elements of hidden that a program of the forward has in flight, per critic
BACKWARD_TILE = 4096
PROGRAMS = 1024  # about what the backward's rows are cut for: eight programs a multiprocessor


def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return value [M, N], mean [N] and std [N]."""
    k, n, h = hidden.shape
    value = hidden.new_empty((k, n), dtype=torch.float32)
    mean, std = value.new_empty(n), value.new_empty(n)
    block_h = _power_of_two(h, 1024)
    block_n = min(TILE // block_h, 128, _power_of_two(n))
    if n:
        with device_guard(hidden):
            kernels.forward_kernel[(triton.cdiv(n, block_n),)](
                hidden,
                weight,
                bias,
                value,
                mean,
                std,
                n,
                h,
                *hidden.stride(),
                *weight.stride(),
                0 if bias is None else bias.stride(0),
                M=k,
                BLOCK_N=block_n,
                BLOCK_H=block_h,
            )
    return value, mean, std


def backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias_dtype: torch.dtype, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias for ``grad`` [M, N]; one that is not needed is empty."""
    k, n, h = hidden.shape
    grad_hidden = torch.empty_like(hidden) if needs[0] else hidden.new_empty(0)
    grad_weight = weight.new_empty((k, h) if needs[1] else 0)
    grad_bias = grad.new_empty(k if needs[2] else 0, dtype=bias_dtype)
    block_h = _power_of_two(h, 512)
    block_n = min(BACKWARD_TILE // block_h, _power_of_two(n))
    slices = triton.cdiv(h, block_h)
    part_rows = block_n * max(1, triton.cdiv(n, block_n * max(1, PROGRAMS // (k * slices))))
    parts = triton.cdiv(n, part_rows)
    sums = needs[1] or needs[2]
    partial = grad.new_empty((parts, k, h + 1)) if sums else None
    with device_guard(hidden):
        if n:
            kernels.backward_kernel[(parts, k, slices)](
                grad,
                hidden,
                weight,
                grad_hidden if needs[0] else None,
                partial,
                n,
                h,
                part_rows,
                *grad.stride(),
                *hidden.stride(),
                *weight.stride(),
                *(grad_hidden.stride() if needs[0] else (0, 0, 0)),
                BLOCK_N=block_n,
                BLOCK_H=block_h,
            )
        if sums:
            block = min(32, _power_of_two(h + 1))
            kernels.add_parts_kernel[(k, triton.cdiv(h + 1, block))](
                partial,
                grad_weight if needs[1] else None,
                grad_bias if needs[2] else None,
                parts,
                h,
                BLOCK_P=min(64, _power_of_two(parts)),
                BLOCK_H=block,
            )
    return grad_hidden, grad_weight, grad_bias


def _power_of_two(size: int, most: int = 2**30) -> int:
    return min(most, triton.next_power_of_2(max(size, 1)))
