"""Log-prob and entropy in plain torch, by chunks of rows forward and slices of the vocabulary backward."""

from __future__ import annotations

import torch
from torch import Tensor

from asyppo_kernels._gemm import accumulate_f32, gradient_operand, mm_into, operand
from asyppo_kernels._policy_head import (
    IGNORE_TARGET,
    HeadOptions,
    RowStats,
    bias_in,
    gradient_buffers,
    leaves_exp,
    lines_per_block,
    logits_,
    product_gradient,
    products,
    row_spans,
    row_stats_,
    slice_bytes,
    subtract_max_,
    tiles,
)


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

    And with ``keep_logits`` what ``row_stats_`` leaves of the logits of the rows with a target, one after the other,
    [N, V]: the rest of it is 0.
    """
    n, v = len(target), len(weight)
    logprob, row_max, log_sum = (hidden.new_zeros(n, dtype=torch.float32) for _ in range(3))
    row_entropy = hidden.new_zeros(n if entropy else 0, dtype=torch.float32)
    weight = operand(weight)
    rows = (target != IGNORE_TARGET).nonzero().squeeze(1)
    limit = n if keep_logits else lines_per_block(v, hidden.device)
    kept = hidden.new_empty((0, v), dtype=torch.float32)
    for chunk in row_spans(rows, n, max(1, limit)):
        z = products(operand(hidden[chunk]), weight, options)
        stats = row_stats_(z, target[chunk], bias, options, entropy=entropy)
        logprob[chunk] = stats.logprob
        row_max[chunk] = stats.row_max
        log_sum[chunk] = stats.log_sum
        if entropy:
            row_entropy[chunk] = stats.entropy
        if keep_logits:
            kept = z
        del z  # before there is another chunk of logits
    if keep_logits and len(kept) < n:
        kept = torch.cat([kept, kept.new_zeros(n - len(kept), v)])
    return RowStats(logprob, row_entropy, row_max, log_sum), kept


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
    in float32 is d_hidden, the smaller of the two. Logits that were not kept are computed again.
    """
    n, v = len(target), len(weight)
    needed = need_hidden, need_weight, need_bias
    counted = target != IGNORE_TARGET
    moves = (grad_logprob != 0) if grad_entropy is None else (grad_logprob != 0) | (grad_entropy != 0)
    moves &= counted
    rows = moves.nonzero().squeeze(1)
    if len(rows) == 0:
        return gradient_buffers(hidden, weight, bias, *needed)
    _, d_weight, d_bias = gradient_buffers(hidden, weight, bias, *needed, empty=True)
    d_hidden = gradient_buffers(hidden, weight, bias, need_hidden, False, False)[0]

    if len(kept) and len(rows) < n:
        kept = kept[: int(counted.sum())][moves[counted]]
    target, row_max, log_sum, grad_logprob = target[rows], row_max[rows], log_sum[rows], grad_logprob[rows]
    if grad_entropy is not None:
        entropy, grad_entropy = entropy[rows], grad_entropy[rows]
    x = operand(hidden[rows].to(compute_dtype))
    x_for_gradient = gradient_operand(x)
    d_x = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)

    width = lines_per_block(len(rows), hidden.device, slice_bytes(hidden.device))
    kept_exp = len(kept) > 0 and leaves_exp(options, entropy=len(entropy) > 0)
    bias = bias_in(bias, options)
    for start in range(0, v, width):
        columns = slice(start, min(start + width, v))
        w = weight[columns].to(compute_dtype)
        if len(kept):
            z = kept[:, columns]
            out = torch.empty_like(z, memory_format=torch.contiguous_format)
        else:
            out = z = products(x, operand(w), options)
            part_of_bias = None if bias is None else bias[columns]
            for part in tiles(z):
                subtract_max_(logits_(z[part], part_of_bias, options), row_max[part], bias)
        grad = product_gradient(
            z,
            target,
            row_max,
            log_sum,
            entropy,
            grad_logprob,
            grad_entropy,
            options,
            out=out,
            first_column=start,
            is_exp=kept_exp,
        )
        if need_bias:
            d_bias[columns] = grad.sum(dim=0)
        grad = grad.to(x_for_gradient.dtype)
        if need_hidden:
            accumulate_f32(d_x, grad, gradient_operand(w), first=start == 0)
        if need_weight:
            mm_into(d_weight[columns], grad.t(), x_for_gradient)
        del z, out, grad
    if need_hidden:
        d_hidden[rows] = d_x.to(hidden.dtype)
    return d_hidden, d_weight, d_bias
