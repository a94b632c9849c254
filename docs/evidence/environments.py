"""Success in the grid world against steps, a panel a slip probability, and what ``drop`` does beside ``keep``.

``python docs/evidence/environments.py environments.json environments.png`` reads what ``asyppo compare`` wrote of
environments.yaml, draws the figure and prints a table. Differences are paired by seed.
"""

from __future__ import annotations

import json
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

from asyppo.compare.summary import paired_difference
from asyppo.config import load_config
from asyppo.data.rows import Row
from asyppo.data.sources import load_eval_rows
from asyppo.environments.grid_world import MOVES, Place

EXAMPLE = Path(__file__).parents[2] / "examples" / "environments" / "grid_world.yaml"
STYLES = {
    "grpo": ("0.35", "-"),
    "ppo keep": ("C0", "-"),
    "ppo drop": ("C0", "--"),
    "asyppo keep": ("C3", "-"),
    "asyppo drop": ("C3", "--"),
}
PAIRS = [
    ("ppo drop", "ppo keep"),
    ("asyppo drop", "asyppo keep"),
    ("asyppo keep", "grpo"),
    ("asyppo drop", "grpo"),
]
"""What is compared within each slip probability."""

Curves = dict[str, dict[str, list[dict[str, Any]]]]
"""By slip probability and method: a curve a seed."""


def curves_of(file: Path) -> Curves:
    """Return the curves in what ``asyppo compare`` wrote; arms are called ``slip 0.2, asyppo drop``."""
    found: Curves = {}
    for arm in json.loads(file.read_text()):
        slip, method = arm["name"].removeprefix("slip ").split(", ")
        found.setdefault(slip, {})[method] = arm["curves"]
    return found


def best(row: Row, slip: float, turns: int) -> float:
    """Return the success of one who knows everything, in the grid world of ``row``."""
    known = row["entry"]["metadata"]
    goal, pits = tuple(known["goal"]), {tuple(pit) for pit in known["pits"]}

    def moved(place: Place, move: Place) -> Place:
        y, x = place[0] + move[0], place[1] + move[1]
        return (y, x) if min(y, x) >= 0 and max(y, x) < known["width"] else place

    @cache
    def value(place: Place, left: int) -> float:
        if place == goal:
            return 1.0
        if place in pits or left == 0:
            return 0.0
        ways = {move: value(moved(place, move), left - 1) for move in MOVES.values()}
        return max((1 - slip) * ways[y, x] + slip * (ways[x, y] + ways[-x, -y]) / 2 for y, x in MOVES.values())

    return value(tuple(known["start"]), turns)


@cache
def best_of(slip: str) -> float:
    """Return the mean of ``best`` over the held-out rows, which are the example's."""
    config = load_config(EXAMPLE)
    rows = load_eval_rows(config.data)
    return statistics.fmean(best(row, float(slip), config.environment.max_turns) for row in rows)


def draw(curves: Curves, image: Path) -> None:
    """Write a PNG: the mean over seeds, and from the least to the most of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = 5 * len(curves), 4.5
    figure, axes = plt.subplots(1, len(curves), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, (slip, methods) in zip(axes.flat, curves.items(), strict=True):
        for method, runs in methods.items():
            if not runs:
                continue
            color, dashes = STYLES[method]
            values = list(zip(*(run["accuracy"] for run in runs), strict=True))
            steps = runs[0]["steps"]
            label = f"{method} ({len(runs)})"
            axis.plot(steps, [statistics.fmean(v) for v in values], dashes, color=color, label=label, linewidth=1.8)
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.08)
        axis.axhline(best_of(slip), color="0.6", linewidth=1, linestyle=":", label="the best there is")
        axis.set(title=f"slip {slip}", xlabel="training step")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("held-out success")
    axes[0, -1].legend(fontsize=8, title="method (seeds)")
    figure.savefig(image, dpi=100)
    plt.close(figure)


def table(curves: Curves) -> str:
    """Return success after the last step, and differences, in Markdown."""
    lines = ["| | " + " | ".join(f"slip {slip}" for slip in curves) + " |", "|---" * (1 + len(curves)) + "|"]
    lines.append("| the best there is | " + " | ".join(f"{best_of(slip):.3f}" for slip in curves) + " |")

    def finals(slip: str, method: str) -> dict[int, float]:
        return {run["seed"]: run["accuracy"][-1] for run in curves[slip].get(method, [])}

    def cell(values: list[float]) -> str:
        return f"{statistics.fmean(values):.3f}" if values else "–"

    first = [[run["accuracy"][0] for runs in methods.values() for run in runs] for methods in curves.values()]
    lines.append("| before training | " + " | ".join(map(cell, first)) + " |")
    for method in STYLES:
        lines.append(f"| {method} | " + " | ".join(cell(list(finals(slip, method).values())) for slip in curves) + " |")
    for of, minus in PAIRS:
        cells = []
        for slip in curves:
            difference = paired_difference(finals(slip, of), finals(slip, minus))
            found = None if difference is None else difference.estimate
            cells.append("–" if found is None else f"{found.mean:+.3f} ± {found.half_width:.3f}")
        lines.append(f"| {of} minus {minus} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    read = curves_of(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        draw(read, Path(sys.argv[2]))
    print(table(read), end="")
