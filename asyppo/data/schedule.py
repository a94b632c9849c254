"""Which rows a step trains on: shuffled passes over the data, in an order that is computed, not stored."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from asyppo.config import ConfigError

PROMPT_ORDER = "swap-or-not"
"""Name of the order. A checkpoint holds it: a run that goes on in another order would meet some rows twice in a pass
and others never."""


class Permutation:
    """A bijection of the numbers from 0 to ``count`` - 1 that follows from ``key``; it takes no memory that grows.

    ``permutation(i)`` is what stands at place i of the shuffled numbers (int64 [n], from int64 [n]). It is a
    swap-or-not shuffle (Hoang, Morris and Rogaway, "An enciphering scheme based on a card shuffle", CRYPTO 2012): in
    round r the numbers x and K_r - x modulo ``count`` change places, or not, as a hash of the pair and the round says.
    Each round is its own inverse, so the whole is a bijection whatever the hash.
    """

    def __init__(self, count: int, key: str):
        self.count = count
        rounds = 6 * max(count - 1, 1).bit_length() + 24
        stream = hashlib.shake_256(key.encode()).digest(16 * rounds)
        self.pivots, self.keys = np.frombuffer(stream, "<u8").astype(np.uint64).reshape(2, rounds)

    def __call__(self, i: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what stands at the places ``i``."""
        x, count = i.astype(np.uint64), np.uint64(self.count)
        for pivot, key in zip(self.pivots % count, self.keys, strict=True):
            partner = (pivot + count - x) % count
            x = np.where(_bit(np.maximum(x, partner) ^ key), partner, x)
        return x.astype(np.int64)


def _bit(x: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """A bit of a hash of each number: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(63)).astype(np.bool_)


class PromptSchedule:
    """Which rows step s trains on: shuffled passes over the data, as a function of the seed and s alone.

    Nothing is remembered between steps, so a run that starts again at step s sees what it would have seen; and a step
    takes the same time and memory whatever the number of rows.
    """

    def __init__(self, num_rows: int, prompts_per_step: int, seed: int):
        if num_rows < 1:
            raise ConfigError(f"data: got {num_rows} training rows, needs at least 1")
        self.num_rows, self.prompts_per_step, self.seed = num_rows, prompts_per_step, seed

    def rows_of_step(self, step: int) -> list[int]:
        """Row numbers of ``step`` (counted from 0)."""
        places = np.arange(step * self.prompts_per_step, (step + 1) * self.prompts_per_step)
        passes = places // self.num_rows
        rows = [
            Permutation(self.num_rows, f"seed {self.seed}, pass {index}")(places[passes == index] % self.num_rows)
            for index in range(passes[0], passes[-1] + 1)
        ]
        return np.concatenate(rows).tolist()
