"""Log-prob and entropy from hidden states: ours, and the heads of other libraries."""

from __future__ import annotations

OP = "linear_logprob"


def test_linear_logprob(case, contender, report) -> None:
    """Error first, then time."""
    report(case, contender)
