"""What ``asyppo audit`` found, as tables for the terminal and for the page, and as charts."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from asyppo.report.figures import Chart, Table, curve, plain

ESTIMATE = ("bias", "rmse", "explained", "explained_within_prompts", "correlation")
BIN = ("value", "truth", "bias", "rmse", "sigma", "advantage_dropped")
MASK = ("tokens", "squared_error", "squared_advantage", "squared_gradient")
HEADS = {
    "explained": "of V*'s variance explained",
    "explained_within_prompts": "within prompts",
    "correlation": "correlation",
    "value": "V̄",
    "truth": "V*",
    "sigma": "σ",
    "advantage_dropped": "masked",
    "squared_error": "of squared error",
    "squared_advantage": "of A*²",
    "squared_gradient": "of (A* (1 − π))²",
    "tokens": "of tokens",
}


def shown(estimate: Mapping[str, float | None]) -> str:
    """Return a number with its interval in brackets, or "–" where there is none."""
    value, low, high = (math.nan if x is None else x for x in (estimate[key] for key in ("value", "low", "high")))
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" if math.isnan(low) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return lines with columns of one width, the first aligned on the left."""
    cells = [list(head), *map(list, rows)]
    widths = [max(_width(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join(c + " " * (w - _width(c)) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _width(text: str) -> int:
    """Columns of a terminal that ``text`` takes: the bar of V̄ takes none."""
    return sum(not unicodedata.combining(letter) for letter in text)


def value_tables(results: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Return the tables of a value audit's results, with their titles."""
    numbers = results["numbers"]

    def cells(prefix: str, names: Sequence[str]) -> list[str]:
        return [shown(numbers[f"{prefix}/{name}"]) if f"{prefix}/{name}" in numbers else "" for name in names]

    estimates = [("V̄", "value"), *((f"critic {m}", f"critic_{m}") for m in range(results["critics"]))]
    tables = [
        (
            "Values against the truth V*",
            Table(
                ["", *(HEADS.get(name, name) for name in ESTIMATE)],
                [[name, *cells(prefix, ESTIMATE)] for name, prefix in estimates],
            ),
        ),
        (
            "Of the truth, of ranks, of advantages",
            Table(
                ["", ""],
                [
                    ["V*: mean", shown(numbers["truth/mean"])],
                    ["V*: standard deviation over states", shown(numbers["truth/std"])],
                    ["standard error of its estimates", shown(numbers["truth/standard_error"])],
                    ["rank correlation of V̄ and V* within a prompt", shown(numbers["value/rank"])],
                    ["the same without noise", shown(numbers["value/rank_corrected"])],
                    ["correlation of the advantage and A*, without noise", shown(numbers["advantage/corrected"])],
                    *(
                        [
                            ["rank correlation of σ and |V̄ − y|", shown(numbers["sigma/rank"])],
                            ["correlation of σ's rank and (V̄ − V*)², without noise", shown(numbers["sigma/corrected"])],
                        ]
                        if "sigma/rank" in numbers
                        else []
                    ),
                ],
            ),
        ),
    ]
    if "sigma/rank" in numbers:
        masks = [("the advantage mask", "advantage_mask"), ("the entropy filter", "entropy_filter")]
        rows = [[name, *cells(prefix, MASK)] for name, prefix in masks]
        tables.append(("What masks drop", Table(["", *(HEADS[name] for name in MASK)], rows)))
    for name, bins in results["tables"].items():
        rows = [[b["name"], str(b["states"]), *(shown(b[key]) for key in BIN)] for b in bins]
        head = ["", "states", *(HEADS.get(key, key) for key in BIN)]
        tables.append((f"By {HEADS.get(name, name)}", Table(head, rows)))
    return tables


def text_of(tables: Sequence[tuple[str, Table]]) -> str:
    """Return tables one under another."""
    return "\n\n".join(f"{title}\n{aligned(table.head, table.rows)}" for title, table in tables)


def gradient_tables(results: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Return the table of a gradient audit's results, with its title."""
    arms = results["arms"]
    loss, reward = ([arm[of] for arm in arms.values()] for of in ("loss", "reward"))
    rows = [
        [name, *map(shown, (a["cosine"], a["minus_first"], a["cosine_of_expectation"], b["cosine"], arm["noise"]))]
        for (name, arm), a, b in zip(arms.items(), loss, reward, strict=True)
    ]
    head = ["", "cosine of a batch", "minus the first arm's", "of the expectation", "with ∇E[reward]", "noise / signal"]
    certain = ", ".join(f"{name} {of['certain']:.2f}" for name, of in results["references"].items())
    batches = results["references"]["loss"]["batches"]
    title = (
        f"Policy gradients of {results['batches']} batches, with a reference of {batches} others "
        f"(share of its square that is no noise: {certain})"
    )
    return [(title, Table(head, rows))]


def value_charts(results: Mapping[str, Any]) -> list[Chart]:
    """Return V̄ and V* by position, by value and by σ, with the intervals of V*."""
    charts = []
    for name, bins in results["tables"].items():
        names = [b["name"] for b in bins]
        data = [curve("V̄", names, [b["value"]["value"] for b in bins], color=0, dash=1)]
        truth = [b["truth"]["value"] for b in bins]
        data.append(curve("V*", names, truth, color=1) | _bars([b["truth"] for b in bins]))
        data.append(curve("RMSE of V̄", names, [b["rmse"]["value"] for b in bins], color=2, dash=2, symbol=1))
        layout = {"xaxis": {"title": {"text": HEADS.get(name, name)}, "type": "category"}, "showlegend": True}
        rows = [[b["name"], str(b["states"]), *(shown(b[key]) for key in BIN)] for b in bins]
        table = Table(["", "states", *(HEADS.get(key, key) for key in BIN)], rows)
        says = "V* with its 95 % interval over prompts; the RMSE is without the noise of the continuations."
        charts.append(Chart(f"Values and the truth by {HEADS.get(name, name)}", data, layout, says, table))
    return charts


def _bars(estimates: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Bars from low to high, where there are all."""
    if any(e[key] is None for e in estimates for key in ("value", "low", "high")):
        return {}
    value, low, high = ([float(e[key] or 0.0) for e in estimates] for key in ("value", "low", "high"))
    over, under = ([a - b for a, b in zip(x, y, strict=True)] for x, y in ((high, value), (value, low)))
    return {
        "error_y": {"type": "data", "symmetric": False, "array": plain(over), "arrayminus": plain(under), "width": 4}
    }
