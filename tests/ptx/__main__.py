"""The command line: ``python -m tests.ptx check | bounds | faults | mutate | versions``, from the repository's root."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tests.ptx import device, tables


def main() -> int:
    """0 if nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "check": "every case under five schedules: values, races, bounds, alignment; the table of README.md",
        "bounds": "instructions and bytes an element, against their budgets; a table of kernels/README.md",
        "faults": "plant a fault of each kind, and see it found",
        "mutate": "leave out each barrier in turn, and see it found; a table of README.md",
        "versions": "budgets and quick cases with every minor version of Triton; a table of kernels/README.md",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in ("check", "bounds", "mutate"):
            command.add_argument(
                "--op", action="append", default=[], help="only this op, and its rows of the table (may be repeated)"
            )
        if name != "faults":
            command.add_argument("--no-write", action="store_true", help="leave the table alone")
        if name in ("check", "mutate"):
            command.add_argument("--quick", action="store_true", help="fewer cases, and fewer schedules")
        if name in ("check", "bounds", "mutate"):
            command.add_argument("--case", default="", help="only cases whose name contains this")
        if name == "check":
            command.add_argument("--greedy", type=int, default=0, metavar="N", help="N seeds of the greedy schedule")
        if name == "versions":
            command.add_argument(
                "--triton", action="append", default=[], help="only this one, such as 3.8, and its row of the table"
            )
    chosen = parser.parse_args()

    start = time.perf_counter()
    if chosen.command == "versions":
        return versions(chosen)
    torch.set_num_threads(1)
    device.install()
    status = {"check": check, "bounds": bounds, "faults": faults, "mutate": mutate}[chosen.command](chosen)
    print(f"{time.perf_counter() - start:.0f} s")
    return status


def check(chosen: argparse.Namespace) -> int:
    """Cases under schedules; all of them have to reach every kernel of the package."""
    from tests.ptx.cases import choose, package_kernels
    from tests.ptx.check import FULL, QUICK, check_all, greedy, table
    from tests.ptx.operations import ELSEWHERE, OPERATIONS

    schedules = greedy(chosen.greedy) if chosen.greedy else QUICK if chosen.quick else FULL
    outcomes = check_all(choose(chosen.op, chosen.case, quick=chosen.quick), schedules)
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"{failed} of {len(outcomes)} cases with problems")
    if not (chosen.case or chosen.quick or chosen.greedy or chosen.no_write):
        text = tables.merged(tables.README, "check", table(outcomes), _ops(), tables.version())
        cases = text.splitlines()[2:]
        unclean = sum(not case.endswith("| nothing |") for case in cases)
        found = f"{tables.version()}. {unclean} of {len(cases)} cases with problems."
        tables.write(tables.README, "check", f"{found}\n\n{text}")
    if chosen.op or chosen.case:
        return 1 if failed else 0
    missed = package_kernels() - {name for outcome in outcomes for name in outcome.kernels}
    if missed:
        print(f"kernels that no case reaches: {sorted(missed)}; add one in tests/ptx/cases_*.py")
    if not (chosen.quick or chosen.greedy):
        unused = set(OPERATIONS) - ELSEWHERE - {op for outcome in outcomes for op in outcome.opcodes}
        if unused:
            print(f"opcodes no kernel uses any more: {sorted(unused)}; delete them from tests/ptx/operations.py")
    return 1 if failed or missed else 0


def bounds(chosen: argparse.Namespace) -> int:
    """Counts an element, beside their budgets."""
    from tests.ptx import counts

    rows = counts.measure_all(chosen.op, chosen.case)
    over = [problem for row in rows for problem in row.problems()]
    print("\n".join([counts.table(rows), *over]))
    if not chosen.no_write:
        order = [line.name.strip("`") for line in counts.LINES]
        text = tables.merged(tables.KERNELS_README, "bounds", counts.table(rows), order, tables.version())
        tables.write(tables.KERNELS_README, "bounds", f"{tables.version()}.\n\n{text}")
    return 1 if over else 0


def faults(chosen: argparse.Namespace) -> int:
    """One fault of each kind."""
    from tests.ptx.faults import FAULTS, plant

    missed = [fault for fault in FAULTS if not plant(fault)]
    return 1 if missed else 0


def mutate(chosen: argparse.Namespace) -> int:
    """Each barrier, left out."""
    from tests.ptx import barriers

    rows = barriers.mutate_all(chosen.op, chosen.case, quick=chosen.quick)
    found = [text for row in rows for text in row.missed] + barriers.stale(rows)
    print("\n".join([barriers.table(rows), *found]))
    if not (chosen.case or chosen.quick or chosen.no_write):
        text = tables.merged(tables.README, "mutate", barriers.table(rows), _ops(), tables.version())
        text = f"{tables.version()}. Not needed:\n\n{barriers.reasons()}\n\n{text}"
        tables.write(tables.README, "mutate", text)
    return 1 if found else 0


def versions(chosen: argparse.Namespace) -> int:
    """Every minor version of Triton."""
    from tests.ptx.versions import judge_all, minor_versions, table

    verdicts = []
    for verdict in judge_all(chosen.triton):
        verdicts.append(verdict)
        print(table([verdict]).splitlines()[-1], flush=True)
        if not chosen.no_write:
            text = tables.merged(tables.KERNELS_README, "versions", table([verdict]), minor_versions())
            tables.write(tables.KERNELS_README, "versions", text)
    return 1 if any(v.over_budget or v.unclean for v in verdicts) else 0


def _ops() -> list[str]:
    from tests.ptx.cases import CASES

    return list(dict.fromkeys(case.op for case in CASES))


if __name__ == "__main__":
    sys.exit(main())
