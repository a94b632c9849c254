"""The definition of ``ensemble_gae``, in any float dtype, one step after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from asyppo_kernels.ensemble_gae.result import EnsembleGAE


def ensemble_gae_reference(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float = 1.0,
) -> EnsembleGAE:
    """Return advantage, returns, mean and std, all [B, T]; see ``ensemble_gae``."""
    value = value.masked_fill(~mask, 0)
    reward = reward.masked_fill(~mask, 0)
    mean, std = value.mean(0), value.std(0, correction=0)
    advantage, returns = torch.zeros_like(mean), torch.zeros_like(mean)
    # Of the valid step after this one; there is none yet.
    next_value, next_advantage, next_residual = mean.new_zeros(3, mean.shape[0])
    for t in reversed(range(mean.shape[1])):
        valid = mask[:, t]
        delta = reward[:, t] + gamma * next_value - mean[:, t]
        next_advantage = torch.where(valid, delta + gamma * lam * next_advantage, next_advantage)
        next_residual = torch.where(valid, delta + gamma * value_lam * next_residual, next_residual)
        next_value = torch.where(valid, mean[:, t], next_value)
        advantage[:, t] = torch.where(valid, next_advantage, 0)
        returns[:, t] = torch.where(valid, next_residual + mean[:, t], 0)
    return EnsembleGAE(advantage, returns, mean, std)
