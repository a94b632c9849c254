"""The loss, its statistics and its gradients in plain torch, in one pass over chunks of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asyppo_kernels._gemm import accumulate_f32, gradient_operand, mm_f32, operand
from asyppo_kernels._policy_head import (
    LOWEST,
    HeadOptions,
    gradient_buffers,
    lines_per_block,
    product_gradient,
    products,
    row_stats_,
)
from asyppo_kernels.linear_ppo_loss.result import LossAndGradients
from asyppo_kernels.linear_ppo_loss.rows import PPOOptions, RowInputs, Rows, chunks, live_and_dead, read_rows

LOG_RATIO_LIMIT = 20.0


class TokenLoss(NamedTuple):
    """Of each row: its share of the loss, the statistics, and d loss / d logprob and d loss / d entropy."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    grad_logprob: Tensor
    grad_entropy: Tensor


def token_loss(rows: Rows, logprob: Tensor, entropy: Tensor, ppo: PPOOptions) -> TokenLoss:
    """Each row's w (-keepA u s - entropy_coef keepH H + kl_coef k3), and its derivatives.

    Without an old log-prob the ratio is exp(logprob - logprob) = 1, its gradient that of exp(logprob) / exp(logprob).
    """
    w, a, u = rows.token_weight, rows.advantage, rows.rollout_weight
    own = logprob.clamp(min=LOWEST)  # a banned target's: -inf - -inf would be NaN
    log_ratio = own - own if rows.old_logprob is None else logprob - rows.old_logprob
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - ppo.clip_low, 1 + ppo.clip_high) * a)
    clipped = torch.where(a > 0, ratio > 1 + ppo.clip_high, ratio < 1 - ppo.clip_low)
    if ppo.dual_clip is not None:
        surrogate = torch.where(a < 0, surrogate.maximum(ppo.dual_clip * a), surrogate)
        clipped |= (a < 0) & (ratio > ppo.dual_clip)
    clamped = log_ratio.abs() > LOG_RATIO_LIMIT
    clipped |= clamped
    clipped &= a != 0

    loss = -(u * surrogate).where(rows.surrogate_on, 0.0)
    grad_logprob = -(u * a * ratio).where(rows.surrogate_on & ~clipped, 0.0)
    loss -= ppo.entropy_coef * entropy.where(rows.entropy_on, 0.0)
    grad_entropy = -ppo.entropy_coef * w.where(rows.entropy_on, 0.0)
    if ppo.kl_coef != 0:
        log_ref_ratio = rows.ref_logprob - logprob
        bounded = log_ref_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        growth = bounded.expm1()
        k3 = growth - bounded
        moves = log_ref_ratio.abs() <= LOG_RATIO_LIMIT
        slope = -growth.where(moves, 0.0)
        if ppo.kl_bias_correction:  # k3 - growth is -bounded, and would lose its digits
            slope = ratio * slope.where(clamped, torch.where(moves, -bounded, k3))
            k3 = ratio * k3
        loss += ppo.kl_coef * k3
        grad_logprob += ppo.kl_coef * slope
    return TokenLoss(w * loss, ratio, clipped, w * grad_logprob, grad_entropy)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    given: RowInputs,
    head: HeadOptions,
    ppo: PPOOptions,
    *,
    compact: bool,
    dead_row_stats: bool,
    workspace_bytes: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> LossAndGradients:
    """A row's gradient depends on that row alone, so it is formed while the row's logits are there: three GEMMs."""
    n = len(hidden)
    rows = read_rows(given, ppo)
    loss, logprob, entropy, ratio = (hidden.new_zeros(n, dtype=torch.float32) for _ in range(4))
    clipped = hidden.new_zeros(n, dtype=torch.bool)
    needed = need_hidden, need_weight, need_bias
    _, d_weight, d_bias = gradient_buffers(hidden, weight, bias, *needed, dtype=torch.float32, empty=True)
    d_hidden, _, _ = gradient_buffers(hidden, weight, bias, need_hidden, False, False, dtype=torch.float32)
    need_gradient = any(needed)
    first_gradient = True

    w = operand(weight)
    w_for_gradient = gradient_operand(w)
    size = lines_per_block(len(weight), hidden.device, workspace_bytes)
    shown = rows.counted if dead_row_stats else rows.live
    compacted = live_and_dead(rows) if compact else None
    # Logits of all chunks in one block of memory: for a new one each, the system would have to clear it first.
    block, one_block = None, head.logits_dtype == w.dtype == torch.float32
    for index, live in chunks(n, size, compacted, dead_row_stats=dead_row_stats):
        part, visible = rows.take(index), shown[index]
        x = hidden[index]
        if not compact:  # rows that do not count are still here, and 0 * NaN would reach d_weight
            x = x.where(visible[:, None], 0.0)
        if block is not None and len(block) < len(x):
            block = None
        z = products(operand(x), w, head, out=block)
        if one_block and block is None:
            block = z
        stats = row_stats_(z, part.target, bias, head, entropy=True)
        token = token_loss(part, stats.logprob, stats.entropy, ppo)
        loss[index] = token.loss
        logprob[index] = stats.logprob.where(visible, 0.0)
        entropy[index] = stats.entropy.where(visible, 0.0)
        ratio[index] = token.ratio.where(visible, 0.0)
        clipped[index] = token.clipped & visible
        if live and need_gradient:
            grad = product_gradient(
                z,
                part.target,
                stats.row_max,
                stats.log_sum,
                stats.entropy,
                token.grad_logprob,
                token.grad_entropy if ppo.entropy_coef != 0 else None,
                head,
                out=z,
            )
            if need_bias:
                total = grad.sum(dim=0)
                d_bias.copy_(total) if first_gradient else d_bias.add_(total)
            x = gradient_operand(x)
            grad = grad.to(x.dtype)
            if need_hidden:
                d_hidden[index] = mm_f32(grad, w_for_gradient)
            if need_weight:
                accumulate_f32(d_weight, grad.t(), x, first=first_gradient)
            first_gradient = False
            del grad
        del z  # before there is another chunk of logits
    if first_gradient:
        d_weight.zero_()
        d_bias.zero_()
    return LossAndGradients(loss.sum(), logprob, entropy, ratio, clipped, d_hidden, d_weight, d_bias)
