"""A walk over a grid, to the goal and around the pits, on ground that may be slippery."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from random import Random
from typing import Any

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
Place = tuple[int, int]


class GridWorlds:
    """Rows: grids of ``size`` by ``size`` with ``pits``, whose goal can be reached from the start."""

    def __init__(self, size: int, seed: int, width: int = 4, pits: int = 3):
        if not 2 <= width <= 9 or not 0 <= pits <= width * width - 2:
            raise ValueError(f"needs a width of 2 to 9 and fewer pits than there are places, got {width} and {pits}")
        self.size, self.seed, self.width, self.pits = size, seed, width, pits

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = Random(f"grid world {self.seed} {index}")
        places = [(y, x) for y in range(self.width) for x in range(self.width)]
        while True:
            start, goal, *pits = rng.sample(places, 2 + self.pits)
            ways = ways_to(goal, set(pits), self.width)
            if start in ways:
                break
        told = ", ".join(_said(pit) for pit in sorted(pits)) or "none"
        return {
            "question": f"width {self.width}; pits {told}; goal {_said(goal)}; you {_said(start)}",
            "answer": str(ways[start]),
            "metadata": {
                "source_dataset": "grid_world",
                "width": self.width,
                "start": list(start),
                "goal": list(goal),
                "pits": [list(pit) for pit in pits],
            },
        }


def _said(place: Place) -> str:
    return f"{place[0]} {place[1]}"


def ways_to(goal: Place, pits: set[Place], width: int) -> dict[Place, int]:
    """Return how many moves lead to ``goal`` from each place from which it can be reached without a pit."""
    found, waiting = {goal: 0}, deque([goal])
    while waiting:
        y, x = waiting.popleft()
        for dy, dx in MOVES.values():
            place = y + dy, x + dx
            if min(place) >= 0 and max(place) < width and place not in pits and place not in found:
                found[place] = found[y, x] + 1
                waiting.append(place)
    return found


class GridWorld:
    """An action is ``up``, ``down``, ``left`` or ``right``, and is answered by where that led, row and column. The goal
    ends the episode with reward 1, a pit with 0.

    For rows of the task ``grid_world``. ``slip`` is the probability that a move goes to one of its two sides instead.
    """

    def __init__(self, slip: float = 0.0):
        if not 0 <= slip <= 1:
            raise ValueError(f"slip: got {slip}, needs a probability")
        self.slip = slip

    def reset(self, entry: Mapping[str, Any], seed: int) -> str:
        """Begin at the start of ``entry``, which the prompt describes."""
        known = entry["metadata"]
        self.width, self.rng = known["width"], Random(seed)
        self.place: Place = (known["start"][0], known["start"][1])
        self.goal: Place = (known["goal"][0], known["goal"][1])
        self.pits: set[Place] = {(y, x) for y, x in known["pits"]}
        return ""

    def step(self, action: str) -> tuple[str, float, bool]:
        """Move, or slip, or stay where a wall is."""
        move = MOVES.get(action.strip())
        if move is None:
            return "no move", 0.0, False
        if self.rng.random() < self.slip:
            turn = self.rng.choice((-1, 1))
            move = move[1] * turn, move[0] * turn
        y, x = self.place[0] + move[0], self.place[1] + move[1]
        if min(y, x) >= 0 and max(y, x) < self.width:
            self.place = y, x
        done = self.place == self.goal or self.place in self.pits
        return _said(self.place), float(self.place == self.goal), done


def walk(environment: GridWorld, noise: float, guess: float, rng: Random) -> str:
    """Move towards the goal; with probability ``noise`` or ``guess`` anywhere."""
    ways = ways_to(environment.goal, environment.pits, environment.width)
    names = list(MOVES)
    rng.shuffle(names)
    if rng.random() < noise or rng.random() < guess:
        return names[0]
    y, x = environment.place
    far = len(ways)
    return min(names, key=lambda name: ways.get((y + MOVES[name][0], x + MOVES[name][1]), far))
