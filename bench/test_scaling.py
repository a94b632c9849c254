"""Cost against one size at a time: does it grow as the work does, and with the live rows rather than all rows?"""

from __future__ import annotations

import pytest


def test_scaling(sweep, session) -> None:
    """Each point is checked against the oracle before it is timed."""
    done = session.run_sweep(sweep)
    ours = [row for point in done["points"] for row in point["rows"] if row["ours"]]
    failing = [f"{row['contender']}: {row['reason']}" for row in ours if row["status"] == "failing"]
    assert not failing
    if all(row["status"] != "ok" for row in ours):
        pytest.skip(ours[0]["reason"])
