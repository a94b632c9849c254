"""The trainer's whole step, sampling included."""

from __future__ import annotations

OP = "train_step"


def test_train_step(case, contender, report) -> None:
    """Error first, then time."""
    report(case, contender)
