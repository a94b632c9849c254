"""What each part of the algorithm does to the final accuracy, as pairs of arms of stage1, gcd or critics.

``python docs/evidence/effects.py docs/evidence/stage1.json`` reads what ``asyppo compare`` wrote and prints a table.
Differences are paired by seed, over the seeds that all of an effect's arms have finished. A mask's in the first part is
the mean over the other mask being off and on, which is twice as many runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from asyppo.compare.summary import paired_difference

PPO, ONE, SAME = "ppo, policy-sized critic", "ppo, one mini-critic", "two critics, same data"
NONE, ADVANTAGE, ENTROPY, BOTH = (
    "two critics, disjoint",
    "disjoint + advantage mask",
    "disjoint + entropy filter",
    "asyppo",
)
EFFECTS = {
    "asyppo minus grpo": ([BOTH], ["grpo"]),
    "asyppo minus ppo with a policy-sized critic": ([BOTH], [PPO]),
    "one mini-critic minus a policy-sized one": ([ONE], [PPO]),
    "two critics on the same data minus one": ([SAME], [ONE]),
    "two critics on disjoint shares minus on the same data": ([NONE], [SAME]),
    "the advantage mask": ([ADVANTAGE, BOTH], [NONE, ENTROPY]),
    "the entropy filter": ([ENTROPY, BOTH], [NONE, ADVANTAGE]),
}
"""Arms with something, and arms without it; of several, the mean by seed."""
INPUTS = "inputs, M = 2"
OF_CRITICS = {
    "the oracle, λ = 0.5, minus grpo": (["oracle, λ = 0.5"], ["grpo"]),
    "asyppo as in the paper minus grpo": (["asyppo, the paper's"], ["grpo"]),
    "critics with inputs, no mask, minus grpo": ([INPUTS], ["grpo"]),
    "the same, λ = 0.5, minus grpo": (["inputs, λ = 0.5"], ["grpo"]),
    "λ = 0.5 minus 0.95, with inputs": (["inputs, λ = 0.5"], [INPUTS]),
    "one critic minus two, with inputs": (["inputs, M = 1"], [INPUTS]),
    "the σ mask": (["inputs, σ mask"], [INPUTS]),
    "a random mask": (["inputs, random mask"], [INPUTS]),
    "the σ mask minus a random one": (["inputs, σ mask"], ["inputs, random mask"]),
    "the σ mask but for 4 tokens minus a random one": (["inputs, σ mask but for 4"], ["inputs, random mask"]),
    "the σ mask by position minus a random one": (["inputs, σ mask by position"], ["inputs, random mask"]),
}
"""The same of critics.yaml."""


def table(file: Path) -> str:
    """Return the effects in what ``asyppo compare`` wrote, in Markdown."""
    effects = OF_CRITICS if file.stem == "critics" else EFFECTS
    arms = {arm["name"]: {c["seed"]: c["accuracy"][-1] for c in arm["curves"]} for arm in json.loads(file.read_text())}

    def mean(names: list[str]) -> dict[int, float]:
        seeds = set.intersection(*(set(arms[name]) for name in names))
        return {seed: sum(arms[name][seed] for name in names) / len(names) for seed in seeds}

    lines = ["| effect on the final accuracy | difference | detectable |", "|---|---|---|"]
    for name, (there, absent) in effects.items():
        effect = paired_difference(mean(there), mean(absent))
        if effect is None:
            raise SystemExit(f"{file}: got no seed that all of {', '.join(there + absent)} have finished, needs one")
        lines.append(
            f"| {name} | {effect.estimate.mean:+.3f} ± {effect.estimate.half_width:.3f} | {effect.detectable:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(Path(sys.argv[1])), end="")
