"""The memory of a launch: global memory at the bounds of its tensors, and who touched what, which shows a race."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import numpy as np

from tests.ptx.arithmetic import Array
from tests.ptx.program import Instruction, PTXError

GLOBAL_BASE = 0x7F4200000000
SHARED_BASE = 1024
NOBODY, SEVERAL = -1, -2


class GlobalMemory:
    """The storages of a launch in one flat array, each on its own 256-byte boundary (and no better), guards between."""

    def __init__(self) -> None:
        self.size = 512
        self.pieces: list[tuple[int, int, int]] = []  # (real address, bytes, offset)
        self.flat = np.empty(0, np.uint8)
        self.end = np.empty(0, np.int64)  # of each 256 bytes: where their storage ends; 0 where there is none

    def add(self, real: int, nbytes: int) -> None:
        """Take in the storage at the address ``real`` of this process."""
        if (real, nbytes) in [piece[:2] for piece in self.pieces]:
            return
        if any(real < r + n and r < real + nbytes for r, n, _ in self.pieces):
            raise PTXError("storages overlap")
        offset = (self.size + 511) // 512 * 512 + 256
        self.pieces.append((real, nbytes, offset))
        self.size = offset + nbytes + 1024

    def address(self, real: int) -> int:
        """The address the kernel sees for ``real``, which may stand at the end of its storage."""
        for start, nbytes, offset in self.pieces:
            if start <= real <= start + nbytes:
                return GLOBAL_BASE + offset + real - start
        raise PTXError("a pointer into no known storage")

    def load(self) -> None:
        """Copy the storages in."""
        size = (self.size + 4095) // 4096 * 4096
        self.flat = np.full(size, 0xFF, np.uint8)
        self.end = np.zeros(size // 256 + 1, np.int64)
        for real, nbytes, offset in self.pieces:
            if nbytes:
                self.flat[offset : offset + nbytes] = _bytes_at(real, nbytes)
                self.end[offset // 256 : (offset + nbytes + 255) // 256] = offset + nbytes

    def store(self) -> None:
        """Copy the storages back."""
        for real, nbytes, offset in self.pieces:
            if nbytes:
                _bytes_at(real, nbytes)[:] = self.flat[offset : offset + nbytes]


def _bytes_at(real: int, nbytes: int) -> Array:
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(real), np.uint8)


Report = Callable[[str, int, int, str], None]  # kind, instruction, how many, detail


class Shadow:
    """Who wrote and who read each granule of a memory last, warps numbered over the whole launch.

    Two accesses of different warps race, if one writes, unless they are of one program and a barrier stands between
    them: an epoch of a program ends at each barrier. So a race is found whatever the order in which the warps ran.
    Lanes of one warp run in step. Several warps that store the same value to the same shared memory race, too, but do
    no harm: so Triton stores what all of them hold.
    """

    def __init__(
        self, space: str, size: int, granule: int, warps: int, code: Sequence[Instruction], report: Report
    ) -> None:
        self.space, self.granule, self.warps, self.code, self.report = space, granule, warps, code, report
        n = size // granule + 64
        self.writer, self.write_epoch = np.full(n, NOBODY, np.int32), np.zeros(n, np.int32)
        self.write_at, self.atomic = np.zeros(n, np.int32), np.zeros(n, bool)
        self.reader, self.reader_program = np.full(n, NOBODY, np.int32), np.full(n, NOBODY, np.int32)
        self.read_epoch, self.read_at = np.zeros(n, np.int32), np.zeros(n, np.int32)

    def _granules(self, at: Array, width: int, *others: Array) -> list[Array]:
        """The granules that accesses of ``width`` bytes touch, and ``others`` repeated for each."""
        count = width // self.granule
        first = at // self.granule
        if count == 1:
            return [first, *others]
        return [(first[:, None] + np.arange(count)).ravel(), *(np.repeat(x, count) for x in others)]

    def read(self, at: Array, width: int, warp: Array, epoch: Array, pc: int, *, atomic: bool = False) -> None:
        """Note reads at the bytes ``at``, and report those that race with a write."""
        g, warp, epoch = self._granules(at, width, warp, epoch)
        self._against_writes("read after write", g, warp, epoch, pc, np.zeros(len(g), bool), atomic)
        if self.space == "shared" and (self.writer[g] == NOBODY).any():
            unwritten = np.flatnonzero(self.writer[g] == NOBODY)
            k = unwritten[0]
            self.report("uninitialised shared memory is read", pc, len(unwritten), self._where(g[k], warp[k]))
        if atomic:
            return
        program, before = warp // self.warps, self.reader_program[g]
        here = (before == program) & (self.read_epoch[g] == epoch)
        reader = np.where(here & (self.reader[g] != warp), SEVERAL, warp)
        first = np.where(reader == SEVERAL, self.read_at[g], pc)
        program = np.where((before != NOBODY) & (before != program), SEVERAL, program)
        for array, new in ((self.reader, reader), (self.reader_program, program)):
            array[g] = new
            array[g[array[g] != new]] = SEVERAL  # of this instruction
        self.read_epoch[g] = epoch
        self.read_at[g] = first

    def write(
        self,
        at: Array,
        width: int,
        warp: Array,
        epoch: Array,
        pc: int,
        held: Array,
        holds: Array,
        *,
        atomic: bool = False,
    ) -> None:
        """Note writes, and report those that race. ``held``, ``holds``: memory has the value before, and afterwards."""
        g, warp, epoch, held, holds = self._granules(at, width, warp, epoch, held, holds)
        self._against_writes("write after write", g, warp, epoch, pc, held, atomic)
        program, before = warp // self.warps, self.reader_program[g]
        if (before != NOBODY).any():
            programs = (before != NOBODY) & (before != program)
            warps = (before == program) & (self.read_epoch[g] == epoch) & (self.reader[g] != warp)
            for kind, bad in (("programs", programs), ("warps", warps)):
                self._race(f"write after read: race of {kind}", bad, g, warp, pc, self.reader[g], self.read_at[g])
        self.writer[g], self.write_epoch[g], self.write_at[g], self.atomic[g] = warp, epoch, pc, atomic
        last = self.writer[g]
        if not atomic and (last != warp).any():  # of this instruction
            bad = (last != warp) & ~(holds & (self.space == "shared"))
            other = last // self.warps != program
            for kind, these in (("programs", bad & other), ("warps", bad & ~other)):
                self._race(f"write after write: race of {kind}", these, g, warp, pc, last, np.full(len(g), pc))

    def _against_writes(
        self, name: str, g: Array, warp: Array, epoch: Array, pc: int, held: Array, atomic: bool
    ) -> None:
        writer = self.writer[g]
        other = (writer != NOBODY) & (writer != warp) & ~(held & (self.space == "shared"))
        if atomic:
            other &= ~self.atomic[g]
        if not other.any():
            return
        programs = other & (writer // self.warps != warp // self.warps)
        warps = other & ~programs & (self.write_epoch[g] == epoch)
        for kind, bad in (("programs", programs), ("warps", warps)):
            self._race(f"{name}: race of {kind}", bad, g, warp, pc, writer, self.write_at[g])

    def _race(self, kind: str, bad: Array, g: Array, warp: Array, pc: int, other: Array, other_at: Array) -> None:
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            against = f"against {self._who(other[k])} at {self.code[other_at[k]]}"
            self.report(kind, pc, int(bad.sum()), f"{self._where(g[k], warp[k])} {against}")

    def _where(self, granule: int, warp: int) -> str:
        return f"{self.space} byte {int(granule) * self.granule:#x}, {self._who(warp)}"

    def _who(self, warp: int) -> str:
        return "several" if warp < 0 else f"warp {int(warp) % self.warps} of program {int(warp) // self.warps}"
