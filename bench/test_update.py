"""The trainer's update on a given batch: AsyPPO, symmetric PPO, GRPO; with the ops and without."""

from __future__ import annotations

OP = "update"


def test_update(case, contender, report) -> None:
    """Error first, then time."""
    report(case, contender)
