"""The policy loss and its gradients from hidden states: ours, and losses over the heads of other libraries."""

from __future__ import annotations

OP = "linear_ppo_loss"


def test_linear_ppo_loss(case, contender, report) -> None:
    """Error first, then time."""
    report(case, contender)
