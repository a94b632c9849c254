"""Statistics of a batch, of which every rank holds the whole: nothing here communicates."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(value: Tensor, mask: Tensor) -> Tensor:
    """Return the float32 sum of ``value`` where ``mask``; what lies elsewhere is not read, NaN included."""
    return torch.where(mask, value.float(), 0.0).sum()


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``value`` where ``mask``; 0 where nothing counts."""
    return masked_sum(value, mask) / mask.sum().clamp(min=1)


def masked_moments(value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population variance of ``value`` where ``mask``; zeros where nothing counts."""
    mean = masked_mean(value, mask)
    return mean, masked_mean((value - mean).square(), mask)


def masked_extremes(value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum of ``value`` where ``mask``; zeros where nothing counts."""
    if not mask.any():
        return torch.zeros((), device=value.device), torch.zeros((), device=value.device)
    chosen = value[mask]
    return chosen.min(), chosen.max()
