"""Result files: written without paths, read back, drawn, set side by side, and compared."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import behind, compare, report, results, run
from bench.suite import Session


@pytest.fixture(scope="module")
def result() -> results.Result:
    """A small run: two ops, few contenders."""
    session = Session(torch.device("cpu"), quick=True, select=lambda entry: entry.name in ("asyppo (torch)", "sort"))
    for case in session.cases(["agreement_masks", "ensemble_gae"]):
        session.run_case(case)
    session.run_sweep(session.sweeps(["agreement_masks"])[0])
    return session.result


@pytest.fixture
def files(result: results.Result, tmp_path: Path) -> tuple[Path, Path]:
    """The run, and one of another device on which our masks take twice the time."""
    other = copy.deepcopy(result)
    other["device"]["name"] = "Other device"
    for _, row in results.rows(other):
        if row["contender"] == "asyppo (torch)":
            row["seconds"]["median"] *= 2
            row["floor_multiple"] *= 2
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, content in zip(paths, (result, other), strict=True):
        results.save(content, path)
    return paths


def test_result_says_where_it_comes_from(result: results.Result) -> None:
    """Device, versions, commit, date, shapes; neither a host's name nor a path."""
    assert result["device"]["name"]
    assert result["versions"]["torch"] == torch.__version__
    assert result["date"].endswith("Z")
    assert result["floors"]["copy"] > 0
    assert result["cases"][0]["sizes"]
    text = json.dumps(result)
    assert str(results.ROOT) not in text
    assert str(Path.home()) + "/" not in text


def test_result_survives_the_file(result: results.Result, tmp_path: Path) -> None:
    """Infinity, which JSON lacks, becomes null."""
    result = copy.deepcopy(result)
    result["cases"][0]["rows"][0]["errors"] = {"x": float("inf")}
    results.save(result, tmp_path / "r.json")
    again = results.load(tmp_path / "r.json")
    assert again["cases"][0]["rows"][0]["errors"] == {"x": None}
    assert again["floors"] == result["floors"]
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(ValueError, match=r"r\.json"):
        results.load(tmp_path / "r.json")


def test_report_has_tables_and_plots(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Both runs, and the two side by side."""
    pytest.importorskip("matplotlib")
    page = report.write(list(files), tmp_path / "out").read_text()
    assert "agreement_masks, one batch (N = 1,000, float32)" in page
    assert "| **asyppo (torch)** |" in page
    assert "## Side by side" in page
    assert "Other device" in page
    assert "growth" in page
    for name in ("time", "memory", "error", "scaling"):
        assert (tmp_path / "out" / "plots" / f"a-{name}.png").stat().st_size > 1000
        assert f"(plots/b-{name}.png)" in page


def test_report_shows_failing_and_absent(result: results.Result) -> None:
    """With their reasons, and without a time."""
    case = copy.deepcopy(result["cases"][0])
    case["rows"] = [
        {"contender": "x", "ours": False, "status": "failing", "reason": "a: error 1 | limit 0", "less": ""},
        {"contender": "y", "ours": False, "status": "absent", "reason": "y is not installed", "less": ""},
    ]
    table = report.case_table(case, "cpu")
    assert "| x | fails, not timed | | | | | | a: error 1 \\| limit 0 |" in table
    assert "Absent: y (y is not installed)." in table


def timed(name: str, median: float, p20: float, p80: float) -> results.Row:
    """A row, as far as its time goes."""
    seconds = {"median": median, "p20": p20, "p80": p80}
    return {"contender": name, "ours": name.startswith("asyppo"), "status": "ok", "seconds": seconds}


def test_report_says_why_others_are_ahead_on_a_cpu(result: results.Result) -> None:
    """Of the fastest of ours; where samples overlap there is nothing to explain."""
    rows = [timed("asyppo (torch)", 9.0, 8.0, 9.5), timed("asyppo (triton)", 9.9, 9.8, 9.99)]
    rows += [timed("torch.compile", 7.0, 6.0, 7.5), timed("x", 8.1, 7.9, 9.1), timed("y", 7.5, 7.4, 7.6)]
    rows += [timed("slower", 9.1, 9.0, 9.2), {"contender": "z", "ours": False, "status": "absent"}]
    compiled, y, x = behind.lines({"op": "linear_logprob", "rows": rows})
    assert compiled == f"torch.compile takes 0.78 of the time of asyppo (torch): {behind.PASSES}."
    assert y == "y takes 0.83 of the time of asyppo (torch): why is not known."
    assert x == "x takes 0.90 of the time of asyppo (torch): level, as samples spread."
    assert behind.lines({"op": "linear_logprob", "rows": rows[2:]}) == []  # ours did not run

    case = copy.deepcopy(result["cases"][0])
    case["rows"] = [dict(row, contender=name) for row, name in zip(case["rows"] * 2, ("x", "asyppo"), strict=False)]
    for row, median in zip(case["rows"], (1.0, 2.0), strict=True):
        row |= {"seconds": row["seconds"] | {"median": median, "p20": median, "p80": median}, "ours": median == 2.0}
    assert "Ahead of ours: x takes 0.50 of the time of asyppo: why is not known." in report.case_table(case, "cpu")
    assert "Ahead of ours" not in report.case_table(case, "cuda")


def test_committed_results_of_cpus_say_why_others_are_ahead() -> None:
    for path in report.newest(results.RESULTS):
        shown = results.load(path)
        for case in shown["cases"] if shown["device"]["type"] == "cpu" else []:
            assert not [line for line in behind.lines(case) if "not known" in line], (path.name, case["name"])


def test_compare_exits_non_zero_past_the_ratio(files: tuple[Path, Path]) -> None:
    """Ours only, unless all are asked for; devices that differ by multiples of their floors."""
    old, new = (str(path) for path in files)
    assert compare.main([old, old]) == 0
    assert compare.main([old, new]) == 2  # two devices
    assert compare.main([old, new, "--by", "floor"]) == 1
    assert compare.main([old, new, "--by", "floor", "--ratio", "2.01"]) == 0
    assert compare.main([new, old, "--by", "floor", "--all"]) == 0


def test_compare_notices_what_stopped_working(result: results.Result) -> None:
    """Failing is worse than slow."""
    new = copy.deepcopy(result)
    row = next(row for _, row in results.rows(new) if row["ours"] and row["status"] == "ok")
    row |= {"status": "failing", "reason": "wrong"}
    _, worse = compare.compare(result, new, ratio=1e9)
    assert len(worse) == 1
    assert "now fails: wrong" in worse[0]


def test_run_in_parts(result: results.Result, tmp_path: Path) -> None:
    """Of one commit, on one machine."""
    path = tmp_path / "r.json"
    results.save(result, path)
    rest = {**result, "cases": [{"op": "x"}], "sweeps": []}
    results.carry_on(rest, path)
    assert [case["op"] for case in rest["cases"]] == ["agreement_masks", *["ensemble_gae"] * 3, "x"]
    assert len(rest["sweeps"]) == 1
    with pytest.raises(ValueError, match=r"r\.json: commit: got '.*', needs 'other'; write another file"):
        results.carry_on({**rest, "commit": "other"}, path)


def test_run_writes_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command for a machine without pytest."""
    path = tmp_path / "run.json"
    arguments = ["--quick", "--device", "cpu", "--op", "agreement_masks", "--contender", "sort, no", "--out", str(path)]
    assert run.main(arguments) == 0
    assert "agreement_masks, one batch" in capsys.readouterr().out
    names = {row["contender"] for _, row in results.rows(results.load(path)) if row["status"] == "ok"}
    assert names == {"sort, no host sync"}


def test_default_path_names_date_device_and_commit(result: results.Result) -> None:
    """A quick run does not land among the full ones."""
    full = results.default_path(result | {"scale": "cpu", "commit": "0123456789ab"})
    assert full.parent == results.RESULTS
    assert full.name.startswith(result["date"][:10])
    assert full.name.endswith("-0123456.json")
    assert results.default_path(result).parent != results.RESULTS


@pytest.mark.slow
def test_pytest_runs_the_suite(tmp_path: Path) -> None:
    """One test a contender and case; chosen by op or by name; pytest-benchmark's own file has the samples."""
    out, own = tmp_path / "run.json", tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--quick", "--device", "cpu", "--out", str(out)]
    chosen = ["--op", "agreement_masks", "-k", "sort and not compile", f"--benchmark-json={own}"]
    # In what looks like a worker of pytest-xdist, pytest-benchmark leaves its file to the process that has none.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([*command, *chosen], cwd=results.ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    (case,) = results.load(out)["cases"]
    samples = {row["contender"]: row["seconds"]["samples"] for row in case["rows"] if row["status"] == "ok"}
    measured = json.loads(own.read_text())["benchmarks"]
    assert {m["name"]: m["group"] for m in measured} == {
        f"test_op[agreement_masks: one batch: {name}]": "agreement_masks: one batch"
        for name in ("sort", "sort, no host sync")
    }
    for m in measured:
        name = m["name"].split(": ")[2].rstrip("]")
        assert m["stats"]["data"] == pytest.approx(samples[name])
        assert m["extra_info"]["errors"]
