"""One fault of each kind, planted in compiled kernels: ``python -m tests.ptx faults`` says whether the check finds it.

A fault is a change of one instruction, as a slip in a kernel's source would compile to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.ptx.case import Case, Results, compare
from tests.ptx.cases import CASES
from tests.ptx.machine import Schedule
from tests.ptx.operations import access_width
from tests.ptx.program import Address, Immediate, Instruction, Program, PTXError, Register


@dataclass(frozen=True)
class Fault:
    """``change`` of each instruction that ``where`` holds for, one at a time, until ``finds`` is found."""

    name: str
    op: str
    case: str
    where: Callable[[Instruction], bool]
    change: Callable[[Instruction], Instruction]
    finds: str


def _accesses(space: str, *names: str, width: int = 1) -> Callable[[Instruction], bool]:
    return lambda i: i.parts[0] in names and space in i.parts and access_width(i) >= width


def _moved(i: Instruction) -> Instruction:
    operands = [replace(x, offset=x.offset + 2) if isinstance(x, Address) else x for x in i.operands]
    return replace(i, operands=tuple(operands))


def _left_out(i: Instruction) -> Instruction:
    return replace(i, op="nop", operands=(), guard=None)


FAULTS = [
    Fault(
        "a barrier left out of a reduction",
        "stacked_rms_norm",
        "H = 1,000, residual, several steps a part",
        lambda i: i.op == "bar.sync",
        _left_out,
        "race of warps",
    ),
    Fault(
        "every program takes the first one's row",
        "linear_ppo_loss",
        "V = 101, one block",
        lambda i: Register("%ctaid.x") in i.operands,
        lambda i: replace(i, op="mov.u32", operands=(i.operands[0], Immediate(0))),
        "race of programs",
    ),
    Fault(
        "an address two bytes off",
        "ensemble_value",
        "M = 2, H = 1,024",
        _accesses("global", "ld", width=16),
        _moved,
        "misaligned: global access of 16 bytes",
    ),
    Fault(
        "a load without its mask",
        "linear_logprob",
        "V = 5,003, bf16 logits",
        lambda i: _accesses("global", "ld")(i) and i.guard is not None,
        lambda i: replace(i, guard=None),
        "out of bounds: global access",
    ),
    Fault(
        "a value that is never put into shared memory",
        "stacked_rms_norm",
        "H = 1,000, residual, several steps a part",
        _accesses("shared", "st"),
        _left_out,
        "uninitialised shared memory is read",
    ),
    Fault(
        "an output that is never written",
        "ensemble_value",
        "M = 2, H = 100",
        _accesses("global", "st"),
        _left_out,
        "NaN in ",
    ),
    Fault(
        "a sum that is a difference",
        "stacked_qk_norm_rope",
        "4 and 2 heads of 32",
        lambda i: i.op == "add.f32",
        lambda i: replace(i, op="sub.f32"),
        "error ",
    ),
    Fault(
        "an opcode the emulator does not know",
        "stacked_swiglu",
        "I = 100, halves",
        lambda i: i.op == "mul.f32",
        lambda i: replace(i, op="tanh.approx.f32"),
        "an opcode the emulator does not know",
    ),
]


def findings(
    case: Case, expected: tuple[Results, Results], change: Callable[[Any, Program], Program], *, first: bool = False
) -> list[str]:
    """What the check has to say of a case whose kernels are changed; runs side by side, so that any race shows.

    ``expected``: of the unchanged case. ``first``: no more than what comes up first.
    """
    want, plain = expected
    try:
        got, session = case.run(Schedule(stop=first), change=change)
    except PTXError as error:
        return [str(error)]
    return [*session.issues(), *compare(got, plain, want)[0]]


def plant(fault: Fault, say: Callable[[str], None] = print) -> bool:
    """Whether the check finds a fault, in one of the places where it can be made."""
    case = next(c for c in CASES if (c.op, c.name) == (fault.op, fault.case))
    expected = case.expected()
    for place in range(12):
        found = findings(case, expected, lambda kernel, program: _changed(program, fault, place))  # noqa: B023
        named = [text for text in found if fault.finds in text]
        if named:
            say(f"found   {fault.name}: {named[0][:160]}")
            return True
    say(f"MISSED  {fault.name}, in {fault.op}: {fault.finds!r} is not among {found[:3]}")
    return False


def _changed(program: Program, fault: Fault, place: int) -> Program:
    places: Sequence[int] = [at for at, i in enumerate(program.code) if fault.where(i)]
    if not places:
        return program
    at = places[place % len(places)]
    code = list(program.code)
    code[at] = fault.change(code[at])
    return replace(program, code=tuple(code))
