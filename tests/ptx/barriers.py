"""Leave out each barrier of the compiled kernels in turn: what nothing shows the absence of is untested or unneeded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.ptx.case import Case
from tests.ptx.cases import choose
from tests.ptx.device import Launch
from tests.ptx.faults import findings
from tests.ptx.machine import Schedule
from tests.ptx.operations import access_width
from tests.ptx.program import Address, Immediate, Program

# Cases of several steps, where a barrier guards against the step after. A program of ``ensemble_gae`` is one warp, and
# has none.
QUICK = {
    ("linear_ppo_loss", "600 rows, two blocks"),
    ("linear_ppo_loss", "V = 16,421, blocks as on a GPU"),
    ("ensemble_value", "M = 2, H = 1,100, several blocks a row, several steps a part"),
    ("stacked_rms_norm", "H = 1,000, residual, several steps a part"),
}


def _is_cleared_by_its_reader(program: Program, at: int) -> bool:
    """Whether what comes after is ``st.shared [a], 0``, and the last to touch shared memory is ``ld.shared [a]``."""
    touched = [where for where, i in enumerate(program.code) if access_width(i) and "shared" in i.parts]
    after = [program.code[where] for where in touched if where > at]
    if not after or after[0].parts[0] != "st" or after[-1].parts[0] != "ld":
        return False
    place, value = after[0].operands
    return isinstance(place, Address) and value == Immediate(0) and after[-1].operands[1] == place


@dataclass(frozen=True)
class Unneeded:
    """A barrier of ``kernel`` that nothing needs, found by what is ``reason`` in its code."""

    op: str
    kernel: str
    which: str
    reason: str
    holds: Callable[[Program, int], bool]


UNNEEDED = [
    Unneeded(
        "agreement_masks",
        "count_all_kernel",
        "the barrier before a histogram is cleared",
        "A thread clears the word that it has read itself, of the histogram of the block before, and all additions to "
        "that came before the barrier that it read after.",
        _is_cleared_by_its_reader,
    )
]


@dataclass(frozen=True)
class Row:
    """The barriers of one kernel in one case."""

    case: Case
    kernel: str
    caught: int
    idle: tuple[int, ...]  # no warp comes there
    redundant: tuple[str, ...]  # nothing between it and the barriers around it needs it
    unneeded: tuple[Unneeded, ...]
    missed: tuple[str, ...]


def mutate_all(ops: list[str], text: str, *, quick: bool, say: Callable[[str], None] = print) -> list[Row]:
    """Of the quick cases of ``check``, then of others that reach what these do not; ``quick``: of those in QUICK."""
    rows: dict[tuple[str, str], list[Row]] = {}  # by op and kernel as compiled, which several cases may share
    first = [case for case in choose(ops, text, quick=True) if not quick or (case.op, case.name) in QUICK]
    others = [] if quick or text else [case for case in choose(ops) if not case.quick]
    for case in [*first, *others]:
        if not (case in first or any(found[-1].idle for (op, _), found in rows.items() if op == case.op)):
            continue
        _, session = case.run(Schedule())
        launches = {launch.kernel.hash: launch for launch in session.launches if launch.machine.warps > 1}
        for name, launch in launches.items():
            before = rows.get((case.op, name))
            barriers = before[-1].idle if before else launch.machine.program.barriers() if case in first else ()
            if not any(launch.machine.executed[at] for at in barriers):
                continue
            row = mutate(case, launch, barriers)
            rows.setdefault((case.op, name), []).append(row)
            say(f"{case.op}, {case.name}: {row.kernel}: {row.caught} caught; {list(row.missed)}")
    # What a later case reaches is not idle.
    return [replace(row, idle=row.idle if row is found[-1] else ()) for found in rows.values() for row in found]


def mutate(case: Case, launch: Launch, barriers: Sequence[int]) -> Row:
    """These of one kernel."""
    program, missed, redundant, unneeded, caught, idle = launch.machine.program, [], [], [], 0, []
    expected = case.expected()
    listed = [u for u in UNNEEDED if (u.op, u.kernel) == (case.op, program.name)]
    for at in barriers:
        if not launch.machine.executed[at]:
            idle.append(at)
        elif _stands_alone(program, at):
            redundant.append(str(program.code[at]))
        elif findings(case, expected, _without(launch.kernel.hash, at), first=True):
            caught += 1
        elif found := [u for u in listed if u.holds(program, at)]:
            unneeded += found
        else:
            missed.append(f"{case.op}, {case.name}: {program.name}, instruction {at}: {program.code[at]}")
    return Row(case, program.name, caught, tuple(idle), tuple(redundant), tuple(unneeded), tuple(missed))


def _without(name: str, at: int) -> Callable[[Any, Program], Program]:
    return lambda kernel, program: program.without(at) if kernel.hash == name else program


def _stands_alone(program: Program, at: int) -> bool:
    """Whether no memory is touched between a barrier and the one before, or after, it, in straight code."""
    for step in (-1, 1):
        where = at + step
        while 0 <= where < len(program.code):
            i = program.code[where]
            if i.op == "bar.sync":
                return True
            if i.parts[0] in ("bra", "ret") or access_width(i) or where in program.labels.values():
                break
            where += step
    return False


def stale(rows: list[Row]) -> list[str]:
    """What UNNEEDED says of the kernels of ``rows`` that is not so any more."""
    found = [u for row in rows for u in row.unneeded]
    seen = {(row.case.op, row.kernel) for row in rows}
    return [
        f"{u.op}, {u.kernel}: {u.which} is listed as not needed, and there is none like it; see UNNEEDED in barriers.py"
        for u in UNNEEDED
        if (u.op, u.kernel) in seen and u not in found
    ]


def table(rows: list[Row]) -> str:
    """Markdown: a row per kernel and case."""
    lines = [
        "| op | case | kernel | barriers | caught | next to another | not reached | not needed | missed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = (row.caught, len(row.redundant), len(row.idle), len(row.unneeded), len(row.missed))
        cells = " | ".join(str(count) for count in (sum(counts), *counts))
        lines.append(f"| `{row.case.op}` | {row.case.name} | `{row.kernel}` | {cells} |")
    return "\n".join(lines)


def reasons() -> str:
    """Markdown: why barriers are not needed."""
    return "\n".join(f"- `{u.kernel}` of `{u.op}`: {u.which}. {u.reason}" for u in UNNEEDED)
