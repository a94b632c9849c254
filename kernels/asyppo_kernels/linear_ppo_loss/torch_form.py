"""The loss, its statistics and its gradients in plain torch, in one pass over chunks of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from asyppo_kernels._gemm import addmm_f32_, gradient_operand, mm_f32, operand
from asyppo_kernels._policy_head import (
    HeadOptions,
    gradient_buffers,
    lines_per_block,
    logits,
    product_gradient_,
    row_stats_,
)
from asyppo_kernels.linear_ppo_loss.result import LossAndGradients
from asyppo_kernels.linear_ppo_loss.rows import PPOOptions, Rows, chunks

LOG_RATIO_LIMIT = 20.0


class TokenLoss(NamedTuple):
    """Of each row: its share of the loss, the statistics, and d loss / d logprob and d loss / d entropy."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    grad_logprob: Tensor
    grad_entropy: Tensor


def token_loss(rows: Rows, logprob: Tensor, entropy: Tensor, ppo: PPOOptions) -> TokenLoss:
    """Each row's w (-keepA u s - entropy_coef keepH H + kl_coef k3), and its derivatives."""
    w, a, u = rows.token_weight, rows.advantage, rows.rollout_weight
    log_ratio = logprob - rows.old_logprob
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - ppo.clip_low, 1 + ppo.clip_high) * a)
    clipped = torch.where(a > 0, ratio > 1 + ppo.clip_high, ratio < 1 - ppo.clip_low)
    if ppo.dual_clip is not None:
        surrogate = torch.where(a < 0, surrogate.maximum(ppo.dual_clip * a), surrogate)
        clipped |= (a < 0) & (ratio > ppo.dual_clip)
    clipped |= log_ratio.abs() > LOG_RATIO_LIMIT
    clipped &= a != 0

    loss = -(u * surrogate).where(rows.surrogate_on, 0.0)
    grad_logprob = -(u * a * ratio).where(rows.surrogate_on & ~clipped, 0.0)
    loss -= ppo.entropy_coef * entropy.where(rows.entropy_on, 0.0)
    grad_entropy = -ppo.entropy_coef * w.where(rows.entropy_on, 0.0)
    if ppo.kl_coef != 0:
        log_ref_ratio = rows.ref_logprob - logprob
        bounded = log_ref_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        growth = bounded.expm1()
        loss += ppo.kl_coef * (growth - bounded)
        grad_logprob -= ppo.kl_coef * growth.where(log_ref_ratio.abs() <= LOG_RATIO_LIMIT, 0.0)
    return TokenLoss(w * loss, ratio, clipped, w * grad_logprob, grad_entropy)


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
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
    loss, logprob, entropy, ratio = (hidden.new_zeros(n, dtype=torch.float32) for _ in range(4))
    clipped = hidden.new_zeros(n, dtype=torch.bool)
    d_hidden, d_weight, d_bias = gradient_buffers(
        hidden, weight, bias, need_hidden, need_weight, need_bias, dtype=torch.float32
    )
    need_gradient = need_hidden or need_weight or need_bias

    w = operand(weight)
    w_for_gradient = gradient_operand(w)
    size = lines_per_block(len(weight), hidden.device, workspace_bytes)
    shown = rows.counted if dead_row_stats else rows.live
    for index, live in chunks(rows, size, compact=compact, dead_row_stats=dead_row_stats):
        part, visible = rows.take(index), shown[index]
        x = hidden[index]
        if not compact:  # rows that do not count are still here, and 0 * NaN would reach d_weight
            x = x.where(visible[:, None], 0.0)
        z = logits(operand(x), w, bias, head)
        stats = row_stats_(z, part.target, entropy=True)
        token = token_loss(part, stats.logprob, stats.entropy, ppo)
        loss[index] = token.loss
        logprob[index] = stats.logprob.where(visible, 0.0)
        entropy[index] = stats.entropy.where(visible, 0.0)
        ratio[index] = token.ratio.where(visible, 0.0)
        clipped[index] = token.clipped & visible
        if not (live and need_gradient):
            continue

        grad = product_gradient_(
            z,
            part.target,
            stats.row_max,
            stats.log_sum,
            stats.entropy,
            token.grad_logprob,
            token.grad_entropy if ppo.entropy_coef != 0 else None,
            head,
        )
        if need_bias:
            d_bias += grad.sum(dim=0)
        x = gradient_operand(x)
        grad = grad.to(x.dtype)
        if need_hidden:
            d_hidden[index] = mm_f32(grad, w_for_gradient)
        if need_weight:
            addmm_f32_(d_weight, grad.t(), x)
    return LossAndGradients(loss.sum(), logprob, entropy, ratio, clipped, d_hidden, d_weight, d_bias)
