"""From values and rewards to what the policy learns from: advantages, and which tokens count."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from asyppo.algorithm.masked import masked_moments
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
    values: Tensor
    """float32 [M, B, T]: each critic's own."""
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
    learned: Tensor | None = None,
    trained_by: Tensor | None = None,
    gamma: float,
    lam: float | Tensor,
    value_lambda: float,
    whitening: Literal["none", "batch", "group"],
    advantage_fraction: float,
    entropy_fraction: float,
    quantile_scope: Literal["batch", "sequence"],
) -> LearningSignal:
    """Mean and disagreement of M critics, GAE on the mean, whitening, and AsyPPO's two masks.

    ``value`` [M, B, T], ``reward`` [B, T], ``mask`` bool [B, T], ``group`` int64 [B]. ``learned`` bool [B, T], the
    tokens that losses count, are those that are whitened and ranked (None: ``mask``). ``trained_by`` int64 [B], the
    critic trained on each response, leaves that critic out of the response's mean value (cross-fitting, as in
    arXiv 1608.00060); σ is over all critics. ``lam`` may be float32 [B]. Fractions are the paper's k and h. σ is ranked
    as ``coarse`` has it. (AsyPPO, arXiv 2510.01656; GAE, arXiv 1506.02438.)
    """
    learned = mask if learned is None else learned
    fitted = value if trained_by is None else without_own_critic(value, trained_by)
    gae = ensemble_gae(fitted, reward, mask, gamma=gamma, lam=lam, value_lam=value_lambda)
    std = gae.std if trained_by is None else torch.where(mask, value.std(dim=0, correction=0), 0.0)
    masks = partial(agreement_masks, advantage_fraction=advantage_fraction, entropy_fraction=entropy_fraction)
    if quantile_scope == "batch":
        advantage_keep, entropy_keep, low, high = masks(coarse(std), learned)
    else:
        rows = [masks(of_row, valid) for of_row, valid in zip(coarse(std), learned, strict=True)]
        advantage_keep = torch.stack([row.advantage_keep for row in rows])
        entropy_keep = torch.stack([row.entropy_keep for row in rows])
        low = torch.stack([row.low for row in rows]).mean()
        high = torch.stack([row.high for row in rows]).mean()
    return LearningSignal(
        advantage=whiten(gae.advantage, learned, group, whitening),
        advantage_keep=advantage_keep,
        entropy_keep=entropy_keep,
        raw_advantage=gae.advantage,
        returns=gae.returns,
        value=gae.mean,
        values=value,
        std=std,
        low=low,
        high=high,
    )


def coarse(std: Tensor) -> Tensor:
    """Round float32 ``std`` >= 0 to 12 bits after the leading one, half a part in 4,096.

    All responses to a prompt share their first state, so ties in σ are many, and the last bits of a model's outputs
    depend on what else is in the micro-batch. Ranked as they are, those bits would decide which of the tied tokens a
    mask drops.
    """
    return ((std.view(torch.int32) + 0x400) & ~0x7FF).view(torch.float32)


def length_adaptive_lambda(length: Tensor, alpha: float) -> Tensor:
    """Return λ = 1 - 1 / (α l), at least 0, float32 [B], of responses of ``length`` l tokens (int64 [B]).

    The sum of λ's powers is then α l: an advantage looks ahead over a share of the response, whatever its length
    (VAPO, arXiv 2504.05118, equation 9).
    """
    return (1 - 1 / (alpha * length.float())).clamp(min=0)


def without_own_critic(value: Tensor, trained_by: Tensor) -> Tensor:
    """Put the others' mean in place of the value of the critic that was trained on a response, so that the mean over
    critics is the others'. ``value`` [M, B, T] with M >= 2, ``trained_by`` int64 [B]; returns [M, B, T]."""
    own = torch.arange(len(value), device=value.device)[:, None, None] == trained_by[:, None]
    return torch.where(own, torch.where(own, 0.0, value).sum(dim=0) / (len(value) - 1), value)


def group_signal(
    reward: Tensor,
    mask: Tensor,
    group: Tensor,
    *,
    learned: Tensor | None = None,
    scale: Literal["group", "batch", "none"] = "group",
) -> LearningSignal:
    """GRPO's advantage (arXiv 2402.03300): a response's reward less its group's mean, on each token.

    It is divided by the rewards' standard deviation in the group or in the batch, or, as Dr. GRPO has it
    (arXiv 2503.20783), by nothing. As in TRL: the sample standard deviation, plus 1e-4. A group of one, or of equal
    rewards, gets 0. Tokens outside ``learned`` bool [B, T] (None: ``mask``) are not kept; their response's reward
    still counts in its group.
    """
    learned = mask if learned is None else learned
    score = reward.sum(dim=1)
    count = _sum_by_group(torch.ones_like(score), group)
    mean = _sum_by_group(score, group) / count
    advantage = score - mean
    if scale == "group":
        advantage /= (_sum_by_group(advantage.square(), group) / (count - 1).clamp(min=1)).sqrt() + 1e-4
    elif scale == "batch":
        everyone = torch.ones_like(score, dtype=torch.bool)
        size = everyone.sum()
        advantage /= (masked_moments(score, everyone)[1] * size / (size - 1).clamp(min=1)).sqrt() + 1e-4
    advantage = torch.where(mask, advantage[:, None], 0.0)
    zero = torch.zeros((), device=reward.device)
    return LearningSignal(
        advantage=advantage,
        advantage_keep=learned,
        entropy_keep=learned,
        raw_advantage=advantage,
        returns=torch.where(mask, score[:, None], 0.0),
        value=torch.where(mask, mean[:, None], 0.0),
        values=reward.new_zeros(0, *reward.shape),
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
    """Weight [B, T] of each token of ``mask`` in the loss of the minibatch ``rows`` (int64 [b]), 0 elsewhere.

    Every normalisation is in it, so the losses and gradients of micro-batches add up to those of the minibatch. A
    token that an agreement mask drops still counts in it, and so does, in ``sequence-mean``, a row without tokens.
    """
    chosen = torch.zeros_like(mask)
    chosen[rows] = mask[rows]
    if aggregation == "sequence-mean":
        weight = 1.0 / (mask.sum(dim=1, keepdim=True).clamp(min=1) * len(rows))
    else:
        weight = 1.0 / chosen.sum().clamp(min=1)
    return torch.where(chosen, weight, 0.0)
