"""Every case under several schedules: values against the definition, the same bits in any order, no race, no fault."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tests.ptx.case import Case, Results, compare
from tests.ptx.machine import Schedule
from tests.ptx.program import PTXError

# A race is found under any order; what orders show is that bits do not depend on them.
QUICK = [Schedule(), Schedule("random", seed=1, races=False)]
FULL = [
    Schedule(),
    Schedule("random", seed=1),
    Schedule("random", seed=2, capability=80, contract=True, noise=2.0**-22),
    Schedule("greedy", seed=3, races=False),
    Schedule("random", seed=4, lanes=512, races=False),
]


def greedy(seeds: int) -> list[Schedule]:
    """The plain schedule, and one warp to its barrier before any other for each of ``seeds``."""
    return [Schedule(), *(Schedule("greedy", seed=seed, races=False) for seed in range(seeds))]


@dataclass(frozen=True)
class Outcome:
    """Of one case under all schedules. ``error``: the largest, as a share of what is allowed."""

    case: Case
    problems: tuple[str, ...]
    error: float
    kernels: Counter[str]  # launches of each
    opcodes: frozenset[str]
    instructions: int  # warps', of the first schedule
    seconds: float


def check(case: Case, schedules: Sequence[Schedule]) -> Outcome:
    """Run a case under each schedule."""
    start, problems, worst = time.perf_counter(), [], 0.0
    kernels, opcodes, instructions = Counter[str](), set[str](), 0
    want, plain = case.expected()
    bits: Results | None = None
    for schedule in schedules:
        try:
            got, session = case.run(schedule)
        except PTXError as error:
            problems.append(f"{_words(schedule)}: {error}")
            continue
        found, error = compare(got, plain, want, schedule.noise)
        worst = max(worst, error)
        if (schedule.capability, schedule.contract, schedule.noise) == (90, False, 0):
            if bits is not None and not all(_same(got[key], bits[key]) for key in got):
                found.append("not the bits of the schedule before")
            bits = got
        problems += [f"{_words(schedule)}: {text}" for text in (*found, *session.issues())]
        kernels.update(launch.name for launch in session.launches)
        for launch in session.launches:
            machine = launch.machine
            opcodes |= {machine.program.code[at].parts[0] for at in machine.executed.nonzero()[0]}
            instructions += int(machine.executed.sum()) if schedule is schedules[0] else 0
    seconds = time.perf_counter() - start
    return Outcome(case, tuple(dict.fromkeys(problems)), worst, kernels, frozenset(opcodes), instructions, seconds)


def check_all(
    cases: Sequence[Case], schedules: Sequence[Schedule], say: Callable[[str], None] = print
) -> list[Outcome]:
    """Check one after the other, and say how each went."""
    outcomes = []
    for case in cases:
        outcome = check(case, schedules)
        outcomes.append(outcome)
        state = "PROBLEM" if outcome.problems else "clean"
        say(
            f"{state:8}{case.op:22}{case.name:50} error {outcome.error:4.2f} of what is allowed, "
            f"{outcome.seconds:5.1f} s"
        )
        for problem in outcome.problems:
            say(f"        {problem}")
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row per case."""
    lines = [
        "| op | case | launches | warp instructions | error, of what is allowed | found |",
        "|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        launches = ", ".join(f"{count} `{name.rsplit('.', 1)[-1]}`" for name, count in sorted(o.kernels.items()))
        found = "; ".join(problem.split(" [")[0] for problem in o.problems) or "nothing"
        lines.append(f"| `{o.case.op}` | {o.case.name} | {launches} | {o.instructions:,} | {o.error:.2f} | {found} |")
    return "\n".join(lines)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def _words(schedule: Schedule) -> str:
    return f"{schedule.order} {schedule.seed}, sm_{schedule.capability}"
