"""Why ours takes longer than another contender, in the rows of a CPU's table where it does."""

from __future__ import annotations

from typing import Any

from bench.results import Row

PASSES = (
    "compiled, all that is between the products is a few loops over a row; our form is calls of torch, each of which "
    "passes over a tile of rows"
)
ALONE = "of one critic, stacking saves nothing, and its calls have a dimension more"
NO_CRITICS = "it has no critics, whose update and values are the rest"
# By op and contender; of a case of the op, where one is named.
REASONS = {
    ("linear_logprob", "torch.compile"): PASSES,
    ("linear_logprob", "cut-cross-entropy (torch_compile)"): PASSES,
    ("linear_ppo_loss", "torch.compile"): PASSES,
    ("linear_ppo_loss", "cut-cross-entropy (torch_compile)"): PASSES,
    ("critics", "one by one"): ALONE,
    ("update", "GRPO"): NO_CRITICS,
    ("train_step", "GRPO"): NO_CRITICS,
}


def ahead_of_ours(case: dict[str, Any]) -> list[tuple[Row, Row]]:
    """(a contender that takes less time than the fastest of ours, that one), by time; of what was timed."""
    timed = sorted((row for row in case["rows"] if row["status"] == "ok"), key=lambda row: row["seconds"]["median"])
    ours = next((row for row in timed if row["ours"]), None)
    return [] if ours is None else [(row, ours) for row in timed[: timed.index(ours)]]


def is_level(row: Row, ours: Row) -> bool:
    """Whether medians differ by less than a fiftieth, or lie within the middle three fifths of each other's samples."""
    theirs, own = row["seconds"], ours["seconds"]
    inside = own["p20"] <= theirs["median"] <= own["p80"] and theirs["p20"] <= own["median"] <= theirs["p80"]
    return inside or theirs["median"] > 0.98 * own["median"]


def lines(case: dict[str, Any]) -> list[str]:
    """A sentence for each contender that is ahead of ours."""
    found = []
    for row, ours in ahead_of_ours(case):
        share = f"{row['contender']} takes {row['seconds']['median'] / ours['seconds']['median']:.2f} of the time of"
        if is_level(row, ours):
            found.append(f"{share} {ours['contender']}: level, as samples spread.")
        else:
            reason = REASONS.get((case["op"], row["contender"]), "why is not known")
            found.append(f"{share} {ours['contender']}: {reason}.")
    return found
