"""The command line: ``python -m tests.ptx check | bounds | faults | mutate | versions``, from the repository's root."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from tests.ptx import device

README = Path(__file__).with_name("README.md")
KERNELS_README = Path(__file__).parents[2] / "kernels" / "README.md"


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
            command.add_argument("--op", action="append", default=[], help="only this op (may be repeated)")
        if name != "faults":
            command.add_argument(
                "--no-write", action="store_true", help="leave the table alone, which is written if all run"
            )
        if name in ("check", "mutate"):
            command.add_argument("--quick", action="store_true", help="fewer cases, and fewer schedules")
            command.add_argument("--case", default="", help="only cases whose name contains this")
        if name == "check":
            command.add_argument("--greedy", type=int, default=0, metavar="N", help="N seeds of the greedy schedule")
        if name == "versions":
            command.add_argument("--triton", action="append", default=[], help="only this one, such as 3.8")
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
    from tests.ptx.operations import OPERATIONS

    schedules = greedy(chosen.greedy) if chosen.greedy else QUICK if chosen.quick else FULL
    outcomes = check_all(choose(chosen.op, chosen.case, quick=chosen.quick), schedules)
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    print(f"{failed} of {len(outcomes)} cases with problems")
    if chosen.op or chosen.case:
        return 1 if failed else 0
    missed = package_kernels() - {name for outcome in outcomes for name in outcome.kernels}
    if missed:
        print(f"kernels that no case reaches: {sorted(missed)}; add one in tests/ptx/cases_*.py")
    if not (chosen.quick or chosen.greedy):
        unused = set(OPERATIONS) - {op for outcome in outcomes for op in outcome.opcodes}
        if unused:
            print(f"opcodes no kernel uses any more: {sorted(unused)}; delete them from tests/ptx/operations.py")
        found = f"{_version()}. {failed} of {len(outcomes)} cases with problems."
        if not chosen.no_write:
            write(README, "check", f"{found}\n\n{table(outcomes)}")
    return 1 if failed or missed else 0


def bounds(chosen: argparse.Namespace) -> int:
    """Counts an element, beside their budgets."""
    from tests.ptx import counts

    rows = counts.measure_all(chosen.op)
    over = [problem for row in rows for problem in row.problems()]
    print("\n".join([counts.table(rows), *over]))
    if not (chosen.op or chosen.no_write):
        write(KERNELS_README, "bounds", f"{_version()}.\n\n{counts.table(rows)}")
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
    missed = [text for row in rows for text in row.missed]
    print("\n".join([barriers.table(rows), *missed]))
    if not (chosen.op or chosen.case or chosen.quick or chosen.no_write):
        write(README, "mutate", f"{_version()}.\n\n{barriers.table(rows)}")
    return 1 if missed else 0


def versions(chosen: argparse.Namespace) -> int:
    """Every minor version of Triton."""
    from tests.ptx.versions import judge_all, table

    verdicts = []
    for verdict in judge_all(chosen.triton):
        verdicts.append(verdict)
        print(table([verdict]).splitlines()[-1], flush=True)
    if not (chosen.triton or chosen.no_write):
        write(KERNELS_README, "versions", table(verdicts))
    return 1 if any(v.over_budget or v.unclean for v in verdicts) else 0


def write(path: Path, section: str, text: str) -> None:
    """Replace what stands between a section's markers."""
    begin, end = f"<!-- {section}: begin, written by python -m tests.ptx {section} -->", f"<!-- {section}: end -->"
    before, rest = path.read_text().split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def _version() -> str:
    import triton

    return f"Triton {triton.__version__}"


if __name__ == "__main__":
    sys.exit(main())
