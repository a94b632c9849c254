"""Value clipping and importance weights by hand."""

from __future__ import annotations

import math

import torch

from asyppo.algorithm.policy_losses import importance_weights
from asyppo.algorithm.value_losses import value_cross_entropy, value_loss


def test_value_loss_without_clipping() -> None:
    value = torch.tensor([2.0, -1.0, 5.0], requires_grad=True)
    loss = value_loss(value, torch.zeros(3), torch.tensor([0.5, 1.0, math.pi]), torch.tensor([0.5, 0.25, 0.0]))
    assert loss.item() == 0.5 * 1.5**2 + 0.25 * 2**2
    loss.backward()
    assert value.grad is not None
    assert value.grad.tolist() == [1.5, -1.0, 0.0]


def test_value_clipping() -> None:
    """One value each: near the old one; moved past the clip towards the return; past it and away; past the return."""
    value = torch.tensor([1.25, 2.0, 2.0, 2.0], requires_grad=True)
    old, returns = torch.ones(4), torch.tensor([3.0, 3.0, 0.0, 1.625])
    loss = value_loss(value, old, returns, torch.ones(4), cliprange=0.5)
    # Clipped values are 1.25, 1.5, 1.5, 1.5; the third error and the fourth are larger unclipped.
    assert loss.item() == 1.75**2 + 1.5**2 + 2.0**2 + 0.375**2
    loss.backward()
    assert value.grad is not None
    assert value.grad.tolist() == [-3.5, 0.0, 4.0, 0.75]


def test_cross_entropy() -> None:
    """Its gradient is the value less the return."""
    value, returns = torch.tensor([0.25, 0.9, 0.5, 0.5]), torch.tensor([1.0, 0.0, 0.75, 1.0])
    weight, logit = torch.tensor([1.0, 2.0, 0.5, 0.0]), value.logit().requires_grad_()
    loss = value_cross_entropy(logit, returns, weight)
    torch.testing.assert_close(
        loss.item(), -math.log(0.25) - 2 * math.log(0.1) - 0.5 * math.log(0.5), atol=0, rtol=1e-6
    )
    loss.backward()
    torch.testing.assert_close(logit.grad, weight * (value - returns))


def test_importance_weights() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0, 0.0, -100.0])
    sampler = torch.tensor([-1.0, -1.5, -0.5, -100.0, 0.0])
    weight = importance_weights(old, sampler, clip_max=1.2)
    torch.testing.assert_close(weight, torch.tensor([1.0, 1.2, math.exp(-0.5), 1.2, math.exp(-20)]))
