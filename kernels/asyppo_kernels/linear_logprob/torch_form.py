"""Log-prob and entropy in plain torch, by chunks of rows forward and slices of the vocabulary backward."""

from __future__ import annotations

import torch
from torch import Tensor

from asyppo_kernels._gemm import addmm_f32_, gradient_operand, mm_f32, operand
from asyppo_kernels._policy_head import (
    IGNORE_TARGET,
    HeadOptions,
    RowStats,
    gradient_buffers,
    lines_per_block,
    logits,
    product_gradient_,
    row_spans,
    row_stats_,
    subtract_max_,
)


def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, options: HeadOptions, *, entropy: bool
) -> RowStats:
    """The statistics of every row, [N] each; 0 where the target is -100. An entropy not asked for is empty."""
    n = len(target)
    logprob, row_max, log_sum = (hidden.new_zeros(n, dtype=torch.float32) for _ in range(3))
    row_entropy = hidden.new_zeros(n if entropy else 0, dtype=torch.float32)
    weight = operand(weight)
    rows = (target != IGNORE_TARGET).nonzero().squeeze(1)
    for chunk in row_spans(rows, n, lines_per_block(len(weight), hidden.device)):
        z = logits(operand(hidden[chunk]), weight, bias, options)
        stats = row_stats_(z, target[chunk], entropy=entropy)
        logprob[chunk] = stats.logprob
        row_max[chunk] = stats.row_max
        log_sum[chunk] = stats.log_sum
        if entropy:
            row_entropy[chunk] = stats.entropy
    return RowStats(logprob, row_entropy, row_max, log_sum)


def backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    options: HeadOptions,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients asked for, each in its input's dtype; empty where not needed.

    Slices of the vocabulary rather than chunks of rows: each slice of d_weight is written once, and what accumulates
    in float32 is d_hidden, the smaller of the two.
    """
    d_hidden, d_weight, d_bias = gradient_buffers(hidden, weight, bias, need_hidden, need_weight, need_bias)

    moves = (grad_logprob != 0) if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0)
    rows = ((target != IGNORE_TARGET) & moves).nonzero().squeeze(1)
    if len(rows) == 0:
        return d_hidden, d_weight, d_bias

    target, row_max, log_sum, grad_logprob = target[rows], row_max[rows], log_sum[rows], grad_logprob[rows]
    if grad_entropy is not None:
        entropy, grad_entropy = entropy[rows], grad_entropy[rows]
    x = operand(hidden[rows])
    x_for_gradient = gradient_operand(x)
    d_x = torch.zeros_like(x, dtype=torch.float32)

    width = lines_per_block(len(rows), hidden.device)
    for start in range(0, len(weight), width):
        columns = slice(start, start + width)
        z = logits(x, operand(weight[columns]), None if bias is None else bias[columns], options)
        subtract_max_(z, row_max)
        grad = product_gradient_(
            z, target, row_max, log_sum, entropy, grad_logprob, grad_entropy, options, first_column=start
        )
        if need_bias:
            d_bias[columns] = grad.sum(dim=0)
        grad = grad.to(x_for_gradient.dtype)
        if need_hidden:
            addmm_f32_(d_x, grad, gradient_operand(weight[columns]))
        if need_weight:
            d_weight[columns] = mm_f32(grad.t(), x_for_gradient).to(weight.dtype)
    if need_hidden:
        d_hidden[rows] = d_x.to(hidden.dtype)
    return d_hidden, d_weight, d_bias
