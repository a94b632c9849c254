"""The command line: ``python -m tests.ptx check | bounds | faults | mutate``, from the repository's root."""

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
        "check": "every case under five schedules: values, races, bounds, alignment. Writes README.md's table if all run",
        "bounds": "instructions and bytes an element, against their budgets. Writes kernels/README.md's table if all run",
        "faults": "plant a fault of each kind, and see it found",
        "mutate": "leave out each barrier in turn, and see it found. Writes README.md's table if all run",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text)
        if name != "faults":
            command.add_argument("--op", action="append", default=[], help="only this op (may be repeated)")
        if name in ("check", "mutate"):
            command.add_argument("--quick", action="store_true", help="fewer cases, and fewer schedules")
            command.add_argument("--case", default="", help="only cases whose name contains this")
        if name == "check":
            command.add_argument("--greedy", type=int, default=0, metavar="N", help="N seeds of the greedy schedule")
    chosen = parser.parse_args()

    torch.set_num_threads(1)
    device.install()
    start = time.perf_counter()
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
        write(README, "check", f"{_versions()}. {failed} of {len(outcomes)} cases with problems.\n\n{table(outcomes)}")
    return 1 if failed or missed else 0


def bounds(chosen: argparse.Namespace) -> int:
    """Counts an element, beside their budgets."""
    from tests.ptx import counts

    rows = counts.measure_all(chosen.op)
    over = [problem for row in rows for problem in row.problems()]
    print("\n".join([counts.table(rows), *over]))
    if not chosen.op:
        write(KERNELS_README, "bounds", f"{_versions()}.\n\n{counts.table(rows)}")
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
    if not (chosen.op or chosen.case or chosen.quick):
        write(README, "mutate", f"{_versions()}.\n\n{barriers.table(rows)}")
    return 1 if missed else 0


def write(path: Path, section: str, text: str) -> None:
    """Replace what stands between a section's markers."""
    begin, end = f"<!-- {section}: begin, written by python -m tests.ptx {section} -->", f"<!-- {section}: end -->"
    before, rest = path.read_text().split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def _versions() -> str:
    import triton

    return f"Triton {triton.__version__}"


if __name__ == "__main__":
    sys.exit(main())
