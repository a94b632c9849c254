"""Step 2 of AsyPPO: what a critic minimises."""

from __future__ import annotations

import torch
from torch import Tensor


def value_cross_entropy(logit: Tensor, returns: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted sum of the cross-entropies of ``returns``, in [0, 1], under the probability whose ``logit``
    is given: a scalar, differentiable in it. All arguments have one shape. Least where the probability is the mean
    return, as for squared errors; the gradient in the logit is value minus return. Weights carry every normalisation.
    """
    return torch.nn.functional.binary_cross_entropy_with_logits(logit, returns, weight, reduction="sum")


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
