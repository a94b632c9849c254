"""Step 2 of AsyPPO: what a critic minimises."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss(
    value: Tensor, old_value: Tensor, returns: Tensor, weight: Tensor, *, cliprange: float | None = None
) -> Tensor:
    """Return the weighted sum of squared errors: a scalar, differentiable in ``value``. All arguments have one shape.

    With ``cliprange`` c, PPO's value clipping (arXiv 2005.12729, section 3): the error is the larger of that of
    ``value`` and that of ``value`` clipped to ``old_value`` ± c, so that one which has moved further from the value
    before the update gains nothing by moving on. Weights carry every normalisation.
    """
    error = (value - returns).square()
    if cliprange is not None:
        clipped = old_value + (value - old_value).clamp(-cliprange, cliprange)
        error = torch.maximum(error, (clipped - returns).square())
    return (weight * error).sum()
