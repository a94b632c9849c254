"""From values and rewards to what the policy learns from: advantages, and which tokens count."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from asyppo_kernels import agreement_masks, ensemble_gae


@dataclass
class LearningSignal:
    """What the policy update reads; everything on the response grid [B, T]."""

    advantage: Tensor
    """float32 [B, T]: whitened, not masked."""
    advantage_keep: Tensor
    """bool [B, T]: I^A, False on padding."""
    entropy_keep: Tensor
    """bool [B, T]: I^H, False on padding."""
    raw_advantage: Tensor
    """float32 [B, T]: before whitening."""
    returns: Tensor
    """float32 [B, T]: the λ-return that critics learn; of the mean value where λ < 1."""
    value: Tensor
    """float32 [B, T]: V̄, the mean over critics."""
    std: Tensor
    """float32 [B, T]: σ, the population standard deviation over critics."""
    low: Tensor
    """float32 scalar: advantages of tokens with a σ below it are masked."""
    high: Tensor
    """float32 scalar: tokens with a σ above it get no entropy bonus."""


def ensemble_signal(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    group: Tensor,
    *,
    gamma: float,
    lam: float,
    value_lambda: float,
    whitening: Literal["none", "batch", "group"],
    advantage_fraction: float,
    entropy_fraction: float,
    quantile_scope: Literal["batch", "sequence"],
) -> LearningSignal:
    """Mean and disagreement of M critics, GAE on the mean, whitening, and AsyPPO's two masks.

    ``value`` [M, B, T], ``reward`` [B, T], ``mask`` bool [B, T], ``group`` int64 [B]. Fractions are the paper's k and
    h. (AsyPPO, arXiv 2510.01656; GAE, arXiv 1506.02438.)
    """
    gae = ensemble_gae(value, reward, mask, gamma=gamma, lam=lam, value_lam=value_lambda)
    masks = partial(agreement_masks, advantage_fraction=advantage_fraction, entropy_fraction=entropy_fraction)
    if quantile_scope == "batch":
        advantage_keep, entropy_keep, low, high = masks(gae.std, mask)
    else:
        rows = [masks(std, valid) for std, valid in zip(gae.std, mask, strict=True)]
        advantage_keep = torch.stack([row.advantage_keep for row in rows])
        entropy_keep = torch.stack([row.entropy_keep for row in rows])
        low = torch.stack([row.low for row in rows]).mean()
        high = torch.stack([row.high for row in rows]).mean()
    return LearningSignal(
        advantage=whiten(gae.advantage, mask, group, whitening),
        advantage_keep=advantage_keep,
        entropy_keep=entropy_keep,
        raw_advantage=gae.advantage,
        returns=gae.returns,
        value=gae.mean,
        std=gae.std,
        low=low,
        high=high,
    )


def group_signal(reward: Tensor, mask: Tensor, group: Tensor) -> LearningSignal:
    """GRPO's advantage (arXiv 2402.03300): a response's reward, normalised within its prompt's group, on each token.

    As in TRL: the sample standard deviation, plus 1e-4. A group of one, or of equal rewards, gets 0.
    """
    score = reward.sum(dim=1)
    count = _sum_by_group(torch.ones_like(score), group)
    mean = _sum_by_group(score, group) / count
    variance = _sum_by_group((score - mean).square(), group) / (count - 1).clamp(min=1)
    advantage = torch.where(mask, ((score - mean) / (variance.sqrt() + 1e-4))[:, None], 0.0)
    zero = torch.zeros((), device=reward.device)
    return LearningSignal(
        advantage=advantage,
        advantage_keep=mask,
        entropy_keep=mask,
        raw_advantage=advantage,
        returns=torch.where(mask, score[:, None], 0.0),
        value=torch.where(mask, mean[:, None], 0.0),
        std=torch.zeros_like(reward),
        low=zero,
        high=zero,
    )


def whiten(advantage: Tensor, mask: Tensor, group: Tensor, scope: Literal["none", "batch", "group"]) -> Tensor:
    """Give the advantages [B, T] of the response tokens of the batch, or of each prompt, mean 0 and deviation 1."""
    if scope == "none":
        return advantage
    advantage = torch.where(mask, advantage, 0.0)
    if scope == "batch":
        count, total = mask.sum(), advantage.sum()
        count = count.clamp(min=1)
        deviation = torch.where(mask, advantage - total / count, 0.0)
        variance = deviation.square().sum() / count
    else:
        count = _sum_by_group(mask.sum(dim=1).float(), group).clamp(min=1)
        mean = (_sum_by_group(advantage.sum(dim=1), group) / count)[:, None]
        deviation = torch.where(mask, advantage - mean, 0.0)
        variance = (_sum_by_group(deviation.square().sum(dim=1), group) / count)[:, None]
    return deviation * (variance + 1e-8).rsqrt()


def _sum_by_group(value: Tensor, group: Tensor) -> Tensor:
    """Sum of ``value`` [B] over each row's group, at each row."""
    total = torch.zeros(len(group), dtype=value.dtype, device=value.device)
    return total.index_add_(0, group, value)[group]


def token_weights(mask: Tensor, rows: Tensor, aggregation: Literal["sequence-mean", "token-mean"]) -> Tensor:
    """Weight [B, T] of each token in the loss of the minibatch ``rows`` (int64 [b]), 0 on padding and on other rows.

    Every normalisation is in it, so the losses and gradients of micro-batches add up to those of the minibatch. A
    token that a mask drops still counts in it.
    """
    chosen = torch.zeros_like(mask)
    chosen[rows] = mask[rows]
    if aggregation == "sequence-mean":
        weight = 1.0 / (mask.sum(dim=1, keepdim=True).clamp(min=1) * len(rows))
    else:
        weight = 1.0 / chosen.sum().clamp(min=1)
    return torch.where(chosen, weight, 0.0)
