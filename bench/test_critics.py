"""Critics stacked and one by one: value pass and training step."""

from __future__ import annotations

OP = "critics"


def test_critics(case, contender, report) -> None:
    """Error first, then time."""
    report(case, contender)
