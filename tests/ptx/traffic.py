"""What a launch asks of the memory system: bytes, sectors of 32 bytes, lines of 128, wavefronts of shared memory."""

from __future__ import annotations

from collections import Counter

import numpy as np

from tests.ptx.arithmetic import Array
from tests.ptx.program import Program


class Traffic:
    """Counts of one launch, as its accesses are located."""

    def __init__(self) -> None:
        self.totals = Counter[str]()

    def begin(self, program: Program, size: int) -> None:
        """A launch over ``size`` bytes of global memory."""
        self.program = program
        self.read, self.written = np.zeros(size >> 5, bool), np.zeros(size >> 5, bool)

    def count(self, pc: int, at: Array, warp: Array, lane: Array, width: int, space: str) -> None:
        """One instruction's accesses of ``width`` bytes by the active lanes of some warps."""
        key = warp.astype(np.int64) << np.int64(40)
        if space == "global":
            unique = np.unique(key | (at // width))
            self.totals["requested"] += len(at) * width
            self.totals["unique"] += len(unique) * width  # what lanes of a warp share, once
            self.totals["sectors"] += len(np.unique(key | (at >> 5)))
            self.totals["lines"] += len(np.unique(key | (at >> 7)))
            (self.written if self.program.code[pc].parts[0] == "st" else self.read)[at >> 5] = True
            return
        # 32 lanes are served at once up to 4 bytes each, 16 of 8, 8 of 16; each time takes as many wavefronts as the
        # bank asked most has words to give.
        words = max(1, width // 4)
        group = np.tile((key >> 32) | (lane // (32 // words)), words)
        word = np.concatenate([(at >> 2) + k for k in range(words)])
        pairs = np.unique(np.stack([group, word]), axis=1)
        banks, count = np.unique((pairs[0] << 5) | (pairs[1] & 31), return_counts=True)
        _, first = np.unique(banks >> 5, return_index=True)
        self.totals["wavefronts"] += int(np.maximum.reduceat(count, first).sum())

    def dram(self) -> int:
        """Bytes that cross the memory bus at least: every sector touched, once read and once written."""
        return 32 * (int(self.read.sum()) + int(self.written.sum()))
