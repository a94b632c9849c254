"""``pytest bench`` runs the suite: a test is one contender in one case, and its samples are pytest-benchmark's.

The harness takes the samples of all contenders of a case in turn, by device events where there is a GPU; each test then
replays its own through pytest-benchmark's clock, so that its tables, files and comparisons work as usual.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # `pytest bench` does not put the root there, `python -m pytest bench` does
    sys.path.insert(0, str(ROOT))

from bench import results, suite  # noqa: E402
from bench.contenders import contenders  # noqa: E402
from bench.ops import OPS  # noqa: E402

SESSION = pytest.StashKey[suite.Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the suite's own options."""
    group = parser.getgroup("bench")
    group.addoption("--quick", action="store_true", help="bench: tiny shapes; the times say nothing")
    group.addoption("--device", default="auto", help="bench: auto, cuda or cpu")
    group.addoption("--op", action="append", choices=list(OPS), default=[], help="bench: only this op; repeatable")
    group.addoption("--minutes", type=float, default=8.5, help="bench: what has not begun by then is left out")
    group.addoption("--out", type=Path, help="bench: the result file; default: bench/results/DATE-DEVICE-COMMIT.json")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Benchmarks are off by default in this repository, for the tests' sake; asking for this folder turns them on."""
    if not config.getoption("benchmark_only", False):
        config.option.benchmark_disable = False
        config.option.benchmark_enable = True
    config.stash[SESSION] = suite.Session(
        suite.pick_device(config.getoption("--device")),
        quick=config.getoption("--quick"),
        minutes=config.getoption("--minutes"),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each contender in each case of each op, and of each sweep."""
    session, ops = metafunc.config.stash[SESSION], metafunc.config.getoption("--op")
    if "contender" in metafunc.fixturenames:
        pairs = [
            pytest.param(
                case,
                entry.name,
                id=f"{case.key}: {entry.name}",
                marks=pytest.mark.benchmark(group=case.key, timer=CLOCK),
            )
            for case in session.cases(ops)
            for entry in contenders(case.op)
        ]
        metafunc.parametrize(("case", "contender"), pairs)
    if "sweep" in metafunc.fixturenames:
        sweeps = session.sweeps(ops)
        metafunc.parametrize("sweep", sweeps, ids=[f"{s.op} over {s.axis}" for s in sweeps])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the sweeps last: they are what to lose if time runs out."""
    items.sort(key=lambda item: "sweep" in getattr(item, "fixturenames", ()))


class Replay:
    """A clock that makes pytest-benchmark measure durations taken before."""

    __name__ = "samples of the harness"

    def __init__(self) -> None:
        self._now = 0.0
        self._ticks: Iterator[float] = iter(())

    def load(self, samples: list[float]) -> None:
        """Make the next pairs of readings differ by these."""
        self._ticks = iter([tick for sample in samples for tick in (0.0, sample)])

    def __call__(self) -> float:
        """Read the clock."""
        self._now += next(self._ticks, 1e-9)
        return self._now


CLOCK = Replay()


@pytest.fixture
def session(pytestconfig: pytest.Config) -> suite.Session:
    """Return the run that collects the results."""
    return pytestconfig.stash[SESSION]


@pytest.fixture
def report(session: suite.Session, benchmark) -> Callable[[suite.Case, str], None]:
    """Report a contender's row: an absent one is skipped, a peer that is wrong is an expected failure, ours fails."""

    def report(case: suite.Case, name: str) -> None:
        measured = session.run_case(case)
        row = next(row for row in measured["rows"] if row["contender"] == name)
        if row["status"] in ("absent", "skipped"):
            pytest.skip(row["reason"])
        if row["status"] == "failing":
            (pytest.fail if row["ours"] else pytest.xfail)(row["reason"])
        benchmark.extra_info.update(
            {key: value for key, value in row.items() if key not in ("seconds", "status", "reason", "ours")}
        )
        samples = row["seconds"]["samples"]
        CLOCK.load(samples)
        benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)

    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the result file, if anything was measured."""
    run = session.config.stash.get(SESSION, None)
    if run is not None and run.result["cases"]:
        path = session.config.getoption("--out") or results.default_path(run.result)
        results.save(run.result, path)
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"\nwrote {path}")
