"""A calculator beside chain sums: the policy asks for one operation a turn, and says the answer when it has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random
from typing import Any

OPERATION = re.compile(r"\s*(-?\d{1,9})\s*([-+*])\s*(-?\d{1,9})\s*")
ANSWER = re.compile(r"<answer>\s*(-?\d+)\s*</answer>")


class Calculator:
    """An action is an operation on two integers, ``4 - 1``, which is answered by its result; or
    ``<answer>10</answer>``, which ends the episode, with reward 1 where it is right.

    For rows of reasoning-gym's ``chain_sum``. ``failure`` is the probability that the calculator raises.
    """

    def __init__(self, failure: float = 0.0):
        if not 0 <= failure <= 1:
            raise ValueError(f"failure: got {failure}, needs a probability")
        self.failure = failure

    def reset(self, entry: Mapping[str, Any], seed: int) -> str:
        """Begin with the sum of ``entry``; the prompt asks for it."""
        first, *rest = entry["metadata"]["expression"].split()
        self.right, self.rng = int(entry["answer"]), Random(seed)
        self.total, self.left = int(first), list(zip(rest[::2], rest[1::2], strict=True))
        return ""

    def step(self, action: str) -> tuple[str, float, bool]:
        """Return the result of an operation, or the end."""
        if (answer := ANSWER.search(action)) is not None:
            return "", float(int(answer[1]) == self.right), True
        if self.rng.random() < self.failure:
            raise RuntimeError("the calculator is out of order")
        if (asked := OPERATION.fullmatch(action)) is None:
            return "no operation", 0.0, False
        a, sign, b = int(asked[1]), asked[2], int(asked[3])
        result = a + b if sign == "+" else a - b if sign == "-" else a * b
        if self.left and (a, sign, b) == (self.total, self.left[0][0], int(self.left[0][1])):
            self.total = result
            del self.left[0]
        return str(result), 0.0, False


def calculate(environment: Calculator, noise: float, guess: float, rng: Random) -> str:
    """Ask for the next operation of the sum, wrongly with probability ``noise``, or guess with probability ``guess``
    a turn."""
    if not environment.left or rng.random() < guess:
        off = 0 if not environment.left and rng.random() >= noise else rng.randint(-4, 4)
        return f"<answer>{environment.total + off}</answer>"
    sign, term = environment.left[0]
    total = environment.total + (rng.choice((-2, -1, 1, 2)) if rng.random() < noise else 0)
    return f"{total} {sign} {term}"
