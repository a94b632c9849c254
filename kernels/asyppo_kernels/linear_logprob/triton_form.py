"""Log-prob and entropy: matrix products by cuBLAS, and one Triton launch on each chunk of logits.

Chunks of rows forward, slices of the vocabulary backward, as in the torch form, of which this is the fused twin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyppo_kernels._args import device_guard
from asyppo_kernels._gemm import accumulate_f32, gradient_operand, mm_into, operand
from asyppo_kernels._policy_head import (
    IGNORE_TARGET,
    HeadOptions,
    RowStats,
    even_size,
    gradient_buffers,
    lines_per_block,
    row_spans,
)
from asyppo_kernels._policy_head_kernels import HeadScalars, Workspace, bytes_per_logit, launch_shape, padded
from asyppo_kernels.linear_logprob.kernels import gradient_kernel, statistics_kernel


def forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    *,
    entropy: bool,
    keep_logits: bool,
) -> tuple[RowStats, Tensor]:
    """The statistics of every row, [N] each; 0 where the target is -100. An entropy not asked for is empty.

    No logits are kept: ``keep_logits`` is for CPUs.
    """
    n, v = len(target), len(weight)
    logprob, row_max, log_sum = (hidden.new_zeros(n, dtype=torch.float32) for _ in range(3))
    row_entropy = hidden.new_zeros(n if entropy else 0, dtype=torch.float32)
    rows = (target != IGNORE_TARGET).nonzero().squeeze(1)
    stats = RowStats(logprob, row_entropy, row_max, log_sum)
    kept = hidden.new_empty((0, v), dtype=torch.float32)
    if len(rows) == 0:
        return stats, kept

    bytes_each = bytes_per_logit(hidden, options, gradient=False)
    size = even_size(len(rows), lines_per_block(padded(v), hidden.device, bytes_per_element=bytes_each))
    workspace = Workspace(hidden, options, size, v, gradient=False)
    weight, target = operand(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    block, num_warps = launch_shape(v, softcap=options.softcap is not None)
    with device_guard(hidden):
        for index in row_spans(rows, n, size):
            x = hidden[index]
            z = workspace.logits(operand(x), weight)
            statistics_kernel[(len(x),)](
                z,
                None if isinstance(index, slice) else index,
                target,
                bias,
                logprob,
                row_entropy if entropy else None,
                row_max,
                log_sum,
                index.start if isinstance(index, slice) else 0,
                v,
                workspace.pitch,
                *HeadScalars.of(options),
                SOFTCAP=options.softcap is not None,
                BLOCK=block,
                num_warps=num_warps,
            )
    return stats, kept


def backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    kept: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    options: HeadOptions,
    compute_dtype: torch.dtype,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients asked for, each in its input's dtype; empty where not needed.

    Slices of the vocabulary rather than chunks of rows: each slice of d_weight is written once, and what accumulates
    in float32 is d_hidden, the smaller of the two.
    """
    moves = (grad_logprob != 0) if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0)
    rows = ((target != IGNORE_TARGET) & moves).nonzero().squeeze(1)
    needed = need_hidden, need_weight, need_bias
    if len(rows) == 0:
        return gradient_buffers(hidden, weight, bias, *needed)
    _, d_weight, d_bias = gradient_buffers(hidden, weight, bias, *needed, empty=True)
    d_hidden = gradient_buffers(hidden, weight, bias, *needed)[0] if need_hidden else hidden.new_empty(0)

    v = len(weight)
    x = hidden[rows].to(compute_dtype)
    bytes_each = bytes_per_logit(x, options, gradient=True)
    width = even_size(v, lines_per_block(len(rows), hidden.device, bytes_per_element=bytes_each))
    workspace = Workspace(x, options, len(rows), width, gradient=True)
    x = operand(x)
    x_for_gradient = gradient_operand(x)
    d_x = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    target, grad_logprob = target.contiguous(), grad_logprob.float().contiguous()
    if grad_entropy is not None:
        grad_entropy = grad_entropy.float().contiguous()
    bias = None if bias is None else bias.contiguous()
    block, num_warps = launch_shape(width, softcap=options.softcap is not None)
    with device_guard(hidden):
        for start in range(0, v, width):
            columns = slice(start, start + width)
            w = weight[columns].to(compute_dtype)
            z = workspace.logits(x, operand(w))
            grad = workspace.gradient(z)
            gradient_kernel[(len(rows),)](
                z,
                grad,
                rows,
                target,
                None if bias is None else bias[columns],
                entropy,
                row_max,
                log_sum,
                grad_logprob,
                grad_entropy,
                start,
                z.shape[1],
                workspace.pitch,
                grad.stride(0),
                *HeadScalars.of(options),
                SOFTCAP=options.softcap is not None,
                OVERLAPS=workspace.overlaps,
                BLOCK=block,
                num_warps=num_warps,
            )
            if need_bias:
                d_bias[columns] = grad.sum(dim=0, dtype=torch.float32)
            grad = operand(grad)
            if need_hidden:
                accumulate_f32(d_x, grad, gradient_operand(w), first=start == 0)
            if need_weight:
                mm_into(d_weight[columns], grad.t(), x_for_gradient)
    if need_hidden:
        d_hidden[rows] = d_x.to(hidden.dtype)
    return d_hidden, d_weight, d_bias
