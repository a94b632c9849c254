"""Statistics of a batch, in one place.

On several devices a batch is spread over ranks, and its statistics are those of the whole: every sum here is taken
over all ranks of the default process group where one is initialised, and is local otherwise.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return ``value`` summed over all ranks; the same on each."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def masked_sum(value: Tensor, mask: Tensor) -> Tensor:
    """Return the float32 sum of ``value`` where ``mask``; what lies elsewhere is not read, NaN included."""
    return sum_over_ranks(torch.where(mask, value.float(), 0.0).sum())


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of ``value`` where ``mask``; 0 where nothing counts."""
    return masked_sum(value, mask) / sum_over_ranks(mask.sum()).clamp(min=1)


def masked_moments(value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population variance of ``value`` where ``mask``; zeros where nothing counts."""
    mean = masked_mean(value, mask)
    return mean, masked_mean((value - mean).square(), mask)


def masked_extremes(value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum of ``value`` where ``mask`` on this rank; zeros where nothing counts."""
    if not mask.any():
        return torch.zeros((), device=value.device), torch.zeros((), device=value.device)
    chosen = value[mask]
    return chosen.min(), chosen.max()
