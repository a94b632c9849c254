"""Every op in each of its cases: ours, plain torch, what others use. ``--op linear_logprob`` runs that op alone."""

from __future__ import annotations


def test_op(case, contender, report) -> None:
    """Error first, then time."""
    report(case, contender)
