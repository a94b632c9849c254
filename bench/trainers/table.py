"""Markdown of a result: a table a case, and one of the shares for the front page."""

from __future__ import annotations

from statistics import median
from typing import Any

from bench.report import environment_lines
from bench.trainers.cases import OURS, OURS_GRPO, PEER

PHASES = {
    "gen": "generation",
    "old_log_prob": "old log-probs",
    "update_critic": "critics' update",
    "values": "values",
    "update_actor": "policy's update",
}
Rows = dict[str, dict[str, Any]]


def seconds(row: dict[str, Any], phase: str = "whole") -> float | None:
    """The median step's CPU seconds in ``phase``; None where there is no such phase."""
    found = [step[phase] for step in row["steps"] if phase in step]
    return median(found) if found else None


def rest(row: dict[str, Any]) -> float:
    """The median step's CPU seconds in no phase of the table."""
    return median(step["whole"] - sum(step.get(phase, 0.0) for phase in PHASES) for step in row["steps"])


def per_token(row: dict[str, Any]) -> float:
    """CPU seconds of all steps over the tokens of their responses."""
    return sum(step["whole"] for step in row["steps"]) / sum(step["tokens"] for step in row["steps"])


def share(rows: Rows, name: str, ragged: bool) -> float | None:
    """Our CPU seconds a step over TRL's; where lengths differ, a token. None where either is missing."""
    if name not in rows or PEER not in rows:
        return None
    if ragged:
        return per_token(rows[name]) / per_token(rows[PEER])
    return (seconds(rows[name]) or 0.0) / (seconds(rows[PEER]) or 1.0)


def memory_share(rows: Rows, name: str) -> float | None:
    """Our peak over TRL's."""
    if name not in rows or PEER not in rows:
        return None
    return rows[name]["peak_bytes"] / rows[PEER]["peak_bytes"]


def case_table(case: dict[str, Any]) -> str:
    """One case: by contender CPU seconds a step, its phases, and peak memory."""
    rows: Rows = case["rows"]
    counts = sorted({len(row["steps"]) for row in rows.values()})
    measured = f"Steps that count, of each: {' or '.join(map(str, counts))}."
    lines = [f"### {case['name']}", "", f"{_described(case)} {measured}", ""]
    heads = ["CPU s a step", "of TRL's", "aim", *PHASES.values(), "rest", "peak memory", "of TRL's"]
    lines += ["| | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for name, row in rows.items():
        cells = [
            _short(seconds(row)),
            _short(share(rows, name, case["ragged"])),
            _short(case["targets"].get(name)),
            *(_short(seconds(row, phase)) for phase in PHASES),
            _short(rest(row)),
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            _short(memory_share(rows, name)),
        ]
        bold = name if name == PEER else f"**{name}**"
        lines.append(f"| {bold} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _described(case: dict[str, Any]) -> str:
    rows: Rows = case["rows"]
    sizes = {what: count for row in rows.values() for what, count in row["parameters"].items()}
    text = f"{case['family'].capitalize()}, vocabulary {case['vocabulary']:,}, policy {_shape(case['policy'])}"
    text += f", {sizes['policy']:,} parameters; "
    if "critics" in sizes:
        text += f"2 critics {_shape(case['critic'])}, {sizes['critics']:,} parameters together; "
    count = case["prompts"] * case["generations"]
    text += f"{count} responses to {case['prompts']} prompts, "
    if not case["ragged"]:
        return text + f"{case['prompt']} and {case['completion']} tokens each."
    tokens = median(step["tokens"] for row in rows.values() for step in row["steps"])
    return (
        text + f"at most {case['prompt']} and {case['completion']} tokens, {tokens / count:.0f} in the mean of a "
        "response; shares are of CPU seconds a token."
    )


def _shape(shape: dict[str, int]) -> str:
    return f"{shape['layers']} layers of {shape['hidden']}"


def _short(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.2f}" if number < 10 else f"{number:.1f}"


def page(result: dict[str, Any]) -> str:
    """All cases, under what they were measured on."""
    return "\n\n".join([" ".join(environment_lines(result)), *(case_table(case) for case in result["cases"])])


def summary(result: dict[str, Any]) -> str:
    """Shares of TRL's time and memory by case."""
    lines = [
        "| policy | `grpo`: CPU time | peak memory | `asyppo`, two mini-critics: CPU time | peak memory |",
        "|---|--:|--:|--:|--:|",
    ]
    for case in result["cases"]:
        rows = case["rows"]
        cells = [
            _short(of)
            for name in (OURS_GRPO, OURS)
            for of in (share(rows, name, case["ragged"]), memory_share(rows, name))
        ]
        lines.append(f"| {case['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
