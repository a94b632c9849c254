"""The definition: whole logits, any floating dtype, gradients by plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from asyppo_kernels.linear_logprob.reference import linear_logprob_reference
from asyppo_kernels.linear_ppo_loss.result import LinearPPOLoss


def linear_ppo_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    token_weight: Tensor,
    *,
    advantage_keep: Tensor | None = None,
    entropy_keep: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
) -> LinearPPOLoss:
    """The loss, and the statistics of every row with token_weight != 0, in the dtype of ``hidden``."""
    counts = (token_weight != 0) & (target != -100)
    keep_a = counts if advantage_keep is None else counts & advantage_keep
    keep_h = counts if entropy_keep is None else counts & entropy_keep
    a = advantage.where(keep_a, 0)
    u = torch.ones_like(a) if rollout_weight is None else rollout_weight.where(keep_a, 0)

    target = target.where(counts, -100)
    logprob, entropy = linear_logprob_reference(
        hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap
    )
    assert entropy is not None
    log_ratio = logprob - old_logprob.where(counts, 0)
    ratio = log_ratio.clamp(-20, 20).exp()
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a)
    clipped = ((a > 0) & (ratio > 1 + clip_high)) | ((a < 0) & (ratio < 1 - clip_low)) | (log_ratio.abs() > 20)
    if dual_clip is not None:
        surrogate = torch.where(a < 0, torch.maximum(surrogate, dual_clip * a), surrogate)
        clipped |= (a < 0) & (ratio > dual_clip)

    token_loss = -(u * surrogate).where(keep_a, 0) - entropy_coef * entropy.where(keep_h, 0)
    if ref_logprob is not None:
        d = (ref_logprob.where(counts, 0) - logprob).clamp(-20, 20)
        token_loss = token_loss + kl_coef * (d.exp() - d - 1)
    loss = (token_weight.where(counts, 0) * token_loss).sum()
    ratio = ratio.where(counts, 0)
    return LinearPPOLoss(loss, logprob.detach(), entropy.detach(), ratio.detach(), clipped & (a != 0))
