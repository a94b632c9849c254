"""Advantages on the mean of the critics: ours, loops over time, and vectorised forms."""

from __future__ import annotations

OP = "ensemble_gae"


def test_ensemble_gae(case, contender, report) -> None:
    """Error first, then time."""
    report(case, contender)
