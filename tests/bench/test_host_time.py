"""``bench.host_time``: calls of every op without its kernels, by both ways, forward and backward."""

from __future__ import annotations

import pytest

from asyppo_kernels import _args
from bench import host_time
from bench.registry import Absent


def absent(module: str) -> None:
    raise Absent(f"{module} is not installed")


@pytest.mark.parametrize("row", host_time.ROWS, ids=lambda row: row.name)
def test_every_row_runs_without_a_kernel(row: host_time.Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways launch the same kernels, torch's expressions none; none of them runs. Peers may be missing."""
    monkeypatch.setattr(host_time, "need", absent)
    interpreted = _args.INTERPRETED
    with host_time.without_kernels():
        measured = host_time.measure(row, calls=1, budget=0.0)
    assert interpreted == _args.INTERPRETED
    assert [m.direction for m in measured] == ["forward", "forward + backward"][: 1 + row.backward]
    for m in measured:
        assert m.launches["ours"] == m.launches["registered"] > 0
        assert m.launches.get("torch", 0) == 0
        assert all(seconds > 0 for seconds in m.seconds.values())
        assert m.absent == ({} if row.liger is None else {"Liger": "liger_kernel.ops is not installed"})
    assert f"| `{row.name}` | forward |" in host_time.table(measured)


def test_an_op_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host_time.main(["--op", "softmax"])
    assert "needs the beginning of one of" in capsys.readouterr().err
