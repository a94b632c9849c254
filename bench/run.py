"""``python -m bench.run``: the whole suite without pytest, within the minutes it is given; writes one result file."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import results
from bench.ops import OPS
from bench.report import case_table, floors_line, phase_tables
from bench.suite import Session, pick_device


def main(arguments: list[str] | None = None) -> int:
    """Run, print a table after each case, and save after each case: a run that is cut short leaves what it has."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--op", action="append", choices=list(OPS), default=[], help="only this op (may be repeated)")
    parser.add_argument("--contender", default="", help="only contenders whose name contains this")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run? The times say nothing")
    parser.add_argument("--no-sweeps", action="store_true", help="leave the scaling curves out")
    parser.add_argument("--minutes", type=float, default=8.5, help="what has not begun by then is left out")
    parser.add_argument("--out", type=Path, help="the result file; default: bench/results/DATE-DEVICE-COMMIT.json")
    parser.add_argument("--add", action="store_true", help="to the result file, if there is one of this commit")
    chosen = parser.parse_args(arguments)

    session = Session(
        pick_device(chosen.device),
        quick=chosen.quick,
        minutes=chosen.minutes,
        select=lambda entry: chosen.contender in entry.name,
    )
    path = chosen.out or results.default_path(session.result)
    if chosen.add and path.exists():
        results.carry_on(session.result, path)
    _ = session.floors
    print(floors_line(session.result), flush=True)
    for case in session.cases(chosen.op):
        measured = session.run_case(case)
        print("\n" + case_table(measured, session.device.type) + "\n\n" + phase_tables(measured), flush=True)
        results.save(session.result, path)
    for sweep in [] if chosen.no_sweeps else session.sweeps(chosen.op):
        session.run_sweep(sweep)
        print(f"swept {sweep.op} over {sweep.axis}", flush=True)
        results.save(session.result, path)
    print(f"\nwrote {path}")
    ours_fail = any(row["ours"] and row["status"] == "failing" for _, row in results.rows(session.result))
    return 1 if ours_fail else 0


if __name__ == "__main__":
    raise SystemExit(main())
