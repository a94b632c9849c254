"""Run one launch: programs in waves, warps under a schedule, and what every access has to satisfy.

A register is an array [warps, 32] over the warps of a wave of programs. Neighbouring warps that stand at the same
instruction run it in one call of numpy. A schedule says which warps run and how far; warps of a program meet at
barriers. What the operations do is in ``operations.py``, what a race is in ``memory.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tests.ptx.arithmetic import UNSIGNED, Array, bits_of, dtype_of
from tests.ptx.memory import GLOBAL_BASE, SHARED_BASE, GlobalMemory, Shadow
from tests.ptx.operations import OPERATIONS, access_width
from tests.ptx.program import Address, Immediate, Instruction, Operand, Program, PTXError, Register
from tests.ptx.traffic import Traffic

LANES = np.arange(32)
CONTROL = ("bra", "bar", "ret")
READY, WAITING, DONE = range(3)


@dataclass(frozen=True)
class Schedule:
    """In which order warps run, and what else may differ from one GPU, or one compiler, to another.

    ``lockstep``: all warps side by side, the one furthest behind first. ``random``: some neighbouring warps for a
    random number of instructions, programs in random order. ``greedy``: one warp to its next barrier. ``lanes``:
    threads in flight at once. ``noise``: relative error of the approximate functions. ``contract``: products fused into
    sums. ``stop``: what is found first is an error, and ends the run.
    """

    order: Literal["lockstep", "random", "greedy"] = "lockstep"
    seed: int = 0
    capability: int = 90
    races: bool = True
    lanes: int = 4096
    noise: float = 0.0
    contract: bool = False
    stop: bool = False


class Machine:
    """One launch of ``program``. ``issues`` holds what was found, ``executed`` how often warps ran each instruction."""

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        shared: int,
        parameters: Sequence[bytes],
        memory: GlobalMemory,
        schedule: Schedule,
        seed: int = 0,
        traffic: Traffic | None = None,
    ) -> None:
        self.program, self.grid, self.shared, self.memory = program, tuple(grid), shared, memory
        self.schedule, self.traffic = schedule, traffic
        self.rng = np.random.default_rng((schedule.seed, seed))
        self.warps = program.threads // 32
        # Arguments side by side, eight bytes each.
        self.parameters = b"".join(raw.ljust(8, b"\0") for raw in parameters)
        self.parameter_at = {name: 8 * k for k, name in enumerate(program.parameters)}
        self.issues: dict[tuple[str, str, str], tuple[str, int]] = {}
        self.executed = np.zeros(len(program.code), np.int64)
        # The narrowest access to each memory: races are looked for in pieces of so many bytes.
        accesses = [(i.parts, access_width(i)) for i in program.code if access_width(i)]
        self.granule = {
            space: min([16, *(width for parts, width in accesses if space in parts)]) for space in ("global", "shared")
        }

    def run(self) -> None:
        """All programs of the grid, from and to the memory of the tensors. Raises PTXError where a GPU would fault."""
        programs = int(np.prod(self.grid))
        order = np.arange(programs)
        if self.schedule.order != "lockstep":
            order = self.rng.permutation(programs)
        self.memory.load()
        if self.traffic:
            self.traffic.begin(self.program, len(self.memory.flat))
        self.global_shadow = self.shadow("global", len(self.memory.flat)) if self.schedule.races else None
        step = max(1, self.schedule.lanes // self.program.threads)
        for start in range(0, programs, step):
            Wave(self, order[start : start + step]).run()
        self.memory.store()

    def shadow(self, space: str, size: int) -> Shadow:
        """A race detector for a memory of ``size`` bytes."""
        return Shadow(space, size, self.granule[space], self.warps, self.program.code, self.report)

    def report(self, kind: str, pc: int, count: int, detail: str) -> None:
        """Note an issue; those of one kind and one line count as one. Raises PTXError if the schedule says so."""
        i = self.program.code[pc]
        if self.schedule.stop:
            raise PTXError(f"{kind}: {i} {detail}")
        key = (kind, i.line, i.op)
        text, before = self.issues.get(key, (f"{kind}: {i} {detail}", 0))
        self.issues[key] = (text, before + count)


class Wave:
    """The programs that are in flight at once."""

    def __init__(self, machine: Machine, programs: Array) -> None:
        self.machine, self.program, self.memory = machine, machine.program, machine.memory
        self.per_program, self.rng = machine.warps, machine.rng
        n = len(programs)
        self.shape = (n * self.per_program, 32)
        self.warp = np.repeat(programs, self.per_program) * self.per_program + np.tile(np.arange(self.per_program), n)
        self.warp_of = np.broadcast_to(self.warp.astype(np.int32)[:, None], self.shape)
        self.epoch = np.zeros(self.shape, np.int32)
        thread = (self.warp % self.per_program)[:, None] * 32 + LANES
        x, y, _ = machine.grid
        program = self.warp // self.per_program
        position = {"x": program % x, "y": program // x % y, "z": program // (x * y)}
        self.special = {"%tid.x": thread.astype(np.uint32)} | {
            f"%ctaid.{axis}": np.repeat(at.astype(np.uint32)[:, None], 32, 1) for axis, at in position.items()
        }
        self.special |= {
            f"%nctaid.{axis}": np.full(self.shape, size, np.uint32)
            for axis, size in zip("xyz", machine.grid, strict=True)
        }
        # Shared memory of the programs, side by side.
        self.stride = (machine.shared + 127) // 128 * 128 + 128
        self.shared = np.full(n * self.stride, 0xFF, np.uint8)
        self.shared_start = np.broadcast_to(
            np.repeat(np.arange(n) * self.stride, self.per_program)[:, None], self.shape
        )
        self.global_shadow = machine.global_shadow
        self.shared_shadow = machine.shadow("shared", n * self.stride) if machine.schedule.races else None
        self.registers: dict[str, Array] = {}
        self.parted: dict[int, list[Callable[[slice], None]]] = {}  # by branch: what it passes over, for other lanes
        self.code = [
            None if i.parts[0] in CONTROL and i.op != "bar.warp.sync" else self._bind(pc, i)
            for pc, i in enumerate(self.program.code)
        ]

    def _bind(self, pc: int, i: Instruction) -> Callable[[slice], None]:
        operation = OPERATIONS.get(i.parts[0])
        if operation is None:
            raise PTXError(f"an opcode the emulator does not know: {i}; teach it in operations.py")
        try:
            return operation(self, pc, i)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise PTXError(f"an instruction the emulator does not know: {i}: {error!r}") from error

    # What operations are made of: operands as arrays, and results that go where they belong.

    def register(self, name: str) -> Array:
        """The array behind a register; what nobody wrote is a NaN, or nonsense."""
        if name not in self.registers:
            kind = self.program.registers[name.rstrip("0123456789")]
            fill = {16: 0x7FDE, 32: 0x7FC0DEAD, 64: 0x7FF8DEADDEADDEAD}
            self.registers[name] = (
                np.zeros(self.shape, bool)
                if kind == "pred"
                else np.full(self.shape, fill[bits_of(kind)], UNSIGNED[bits_of(kind)])
            )
        return self.registers[name]

    def constant(self, value: int | float | np.generic, dtype: type[np.generic]) -> Array:
        """A number, for all lanes."""
        return np.broadcast_to(np.asarray(value, dtype), self.shape)

    def value(self, operand: Operand, kind: str) -> Array:
        """A view of the operand as PTX type ``kind``, valid for the whole wave; slice it to read it."""
        if isinstance(operand, Immediate):
            if kind == "f32":
                if not operand.is_float:
                    raise PTXError(f"an integer as {kind}: {operand}")
                return self.constant(np.uint32(operand.value).view(np.float32), np.float32)
            bits = bits_of(kind)
            if kind == "pred":
                return self.constant(operand.value != 0, np.bool_)
            return self.constant(UNSIGNED[bits](operand.value & ((1 << bits) - 1)).view(dtype_of(kind)), dtype_of(kind))
        if not isinstance(operand, Register) or operand.negated:
            raise PTXError(f"an operand the emulator does not know: {operand}")
        if operand.name in self.special:
            return self.special[operand.name].view(dtype_of(kind))
        if operand.name in self.program.shared:
            return self.constant(SHARED_BASE, dtype_of(kind))
        if operand.name in self.program.parameters:
            return self.constant(self.machine.parameter_at[operand.name], dtype_of(kind))
        array = self.register(operand.name)
        if (array.dtype == np.bool_) != (kind == "pred") or (kind != "pred" and array.itemsize * 8 != bits_of(kind)):
            raise PTXError(f"{operand.name} is not of type {kind}")
        return array.view(dtype_of(kind))

    def low(self, operand: Operand, kind: str) -> Callable[[slice], Array]:
        """As ``value``, of a register that may be wider than ``kind``: its low bits."""
        if isinstance(operand, Register) and operand.name.startswith("%r"):
            array, bits = self.register(operand.name), bits_of(kind)
            if array.itemsize * 8 > bits:
                return lambda s: array[s].astype(UNSIGNED[bits]).view(dtype_of(kind))
        array = self.value(operand, kind)
        return lambda s: array[s]

    def predicate(self, operand: Register) -> Callable[[slice], Array]:
        """The lanes where a predicate holds."""
        array = self.register(operand.name)
        return (lambda s: ~array[s]) if operand.negated else (lambda s: array[s])

    def active(self, i: Instruction) -> Callable[[slice], Array | None]:
        """The lanes that run an instruction; None for all."""
        return (lambda s: None) if i.guard is None else self.predicate(i.guard)

    def write(
        self, i: Instruction, evaluate: Callable[[slice], Array], to: Operand | None = None
    ) -> Callable[[slice], None]:
        """The instruction that puts ``evaluate`` into its first operand, or ``to``, under its guard."""
        to = i.operands[0] if to is None else to
        assert isinstance(to, Register)
        array, active = self.register(to.name), self.active(i)

        def run(s: slice) -> None:
            result, lanes = evaluate(s), active(s)
            if result.dtype != array.dtype:
                if result.itemsize != array.itemsize:
                    raise PTXError(f"{result.dtype} into {to.name}: {i}")
                result = result.view(array.dtype)
            if lanes is None:
                array[s] = result
            else:
                np.copyto(array[s], result, where=lanes)

        return run

    def locate(self, pc: int, i: Instruction, operand: Operand, width: int, space: str, of: int = 32) -> Locate:
        """From warps to where the accesses of the active among their first ``of`` lanes go, aligned and in bounds."""
        assert isinstance(operand, Address)
        active = self.active(i)
        if operand.base in self.program.shared:
            base = self.constant(SHARED_BASE, np.int64)
        else:
            base = self.register(operand.base)

        def locate(s: slice) -> Access | None:
            lanes = active(s)
            address = base[s].astype(np.int64) + operand.offset
            lanes = np.broadcast_to(of > LANES, address.shape) if lanes is None else lanes & (of > LANES)
            address, warp = address[lanes], self.warp_of[s][lanes]
            if not address.size:
                return None
            if space == "global":
                at = address - GLOBAL_BASE
                bad = (at < 0) | (at >= len(self.memory.flat))
                bad = bad if bad.any() else at + width > self.memory.end[at >> 8]
            else:
                at = address - SHARED_BASE
                bad = (at < 0) | (at + width > self.machine.shared)
                at = at + self.shared_start[s][lanes]
            for fault, where in (("misaligned", address & (width - 1) != 0), ("out of bounds", bad)):
                if where.any():
                    k = int(np.flatnonzero(where)[0])
                    program, number = divmod(int(warp[k]), self.per_program)
                    raise PTXError(
                        f"{fault}: {space} access of {width} bytes at {int(address[k]):#x}, warp {number} of program "
                        f"{program}: {i}"
                    )
            if self.machine.traffic:
                lane = np.broadcast_to(LANES, lanes.shape)[lanes]
                self.machine.traffic.count(pc, at, warp, lane, width, space)
            return Access(at, warp, self.epoch[s][lanes], lanes)

        return locate

    # Which warps run, and how far.

    def run(self) -> None:
        """All warps to their end."""
        total, order = self.shape[0], self.machine.schedule.order
        self.at, self.state = [0] * total, [READY] * total
        chosen = None
        while not all(state == DONE for state in self.state):
            ready = [w for w in range(total) if self.state[w] == READY]
            if not ready:
                stuck = {str(self.program.code[self.at[w]]) for w in range(total) if self.state[w] == WAITING}
                raise PTXError(f"deadlock at {sorted(stuck)}")
            if order == "lockstep":
                chosen = min(ready, key=lambda w: self.at[w])
            elif order == "random" or chosen not in ready:
                chosen = int(self.rng.choice(ready))
            self._advance(*self._group(chosen))

    def _group(self, chosen: int) -> tuple[int, int, int]:
        """(first warp, last warp + 1, how many instructions at most) of what runs next, around ``chosen``."""
        order, first, last, steps = self.machine.schedule.order, chosen, chosen + 1, len(self.code)
        if order == "greedy":
            return first, last, steps
        here = (READY, self.at[chosen])
        while first > 0 and (self.state[first - 1], self.at[first - 1]) == here:
            first -= 1
        while last < self.shape[0] and (self.state[last], self.at[last]) == here:
            last += 1
        if order == "random":
            if last - first > 1 and self.rng.random() < 0.7:
                first, last = int(self.rng.integers(first, chosen + 1)), int(self.rng.integers(chosen + 1, last + 1))
            if self.rng.random() < 0.5:
                steps = 1 + int(self.rng.geometric(1 / 60))
        return first, last, steps

    def _advance(self, first: int, last: int, steps: int) -> None:
        """Run warps that stand side by side up to their next control instruction, that one too."""
        warps, s = range(first, last), slice(first, last)
        at = start = self.at[first]
        while steps and (run := self.code[at]) is not None:
            run(s)
            at += 1
            steps -= 1
        self.machine.executed[start:at] += len(warps)
        self.at[s] = [at] * len(warps)
        if not steps:
            return
        self.machine.executed[at] += len(warps)
        i = self.program.code[at]
        taken = np.ones(len(warps), bool)
        if i.guard is not None:
            lanes = self.predicate(i.guard)(s)
            taken = lanes.all(1)
            if (taken != lanes.any(1)).any():
                self._part(s, at)
                return
        kind = i.parts[0]
        if kind == "bra":
            assert isinstance(i.operands[0], Register)
            label = self.program.labels[i.operands[0].name]
            self.at[s] = [label if there else at + 1 for there in taken]
        elif kind == "ret":
            self.state[s] = [DONE if there else READY for there in taken]
            self.at[s] = [at if there else at + 1 for there in taken]
        else:
            if i.op != "bar.sync" or i.operands != (Immediate(0),) or i.guard:
                raise PTXError(f"a barrier the emulator does not know: {i}")
            self.state[s] = [WAITING] * len(warps)
        if kind != "bra":
            for program in range(first // self.per_program, (last - 1) // self.per_program + 1):
                self._release(program)

    def _part(self, s: slice, at: int) -> None:
        """Run what some lanes pass over, for those that do not."""
        branch, passed = self.program.code[at], self.program.passed_over(at)
        if passed is None or branch.guard is None:
            raise PTXError(f"lanes of a warp part at {branch}, and do not meet where what it passes over ends")
        others = replace(branch.guard, negated=not branch.guard.negated)
        if at not in self.parted:
            self.parted[at] = [self._bind(pc, replace(self.program.code[pc], guard=others)) for pc in passed]
        for run in self.parted[at]:
            run(s)
        self.machine.executed[passed.start : passed.stop] += int(self.predicate(others)(s).any(1).sum())
        self.at[s] = [passed.stop] * (s.stop - s.start)

    def _release(self, program: int) -> None:
        """Let the warps of a program go on, if all that have not returned wait."""
        warps = range(program * self.per_program, (program + 1) * self.per_program)
        alive = [w for w in warps if self.state[w] != DONE]
        if not alive or any(self.state[w] == READY for w in alive):
            return
        if len({self.at[w] for w in alive}) > 1:
            self.machine.report("warps wait at different barriers", self.at[alive[0]], 1, "")
        for w in alive:
            self.state[w] = READY
            self.at[w] += 1
        self.epoch[warps.start : warps.stop] += 1


@dataclass(frozen=True)
class Access:
    """Where the active lanes of some warps go: bytes of the flat memory, and who they are."""

    at: Array
    warp: Array
    epoch: Array
    lanes: Array  # [warps, 32] bool


Locate = Callable[[slice], Access | None]
