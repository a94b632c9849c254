"""The value heads of several critics: ours, and a linear layer a critic."""

from __future__ import annotations

OP = "ensemble_value"


def test_ensemble_value(case, contender, report) -> None:
    """Error first, then time."""
    report(case, contender)
