"""The masks by order statistics: ours, sorts and selections."""

from __future__ import annotations

OP = "agreement_masks"


def test_agreement_masks(case, contender, report) -> None:
    """Error first, then time."""
    report(case, contender)
