"""Draw the README's learning curve from runs, and print their table.

for s in 0 1 2 3 4; do asyppo train --seed $s --run_name asyppo-$s; done   # likewise --algorithm ppo, grpo
python docs/learning_curve.py runs/asyppo-* runs/ppo-* runs/grpo-*
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml

from asyppo.run import read_jsonl

STYLES = {"asyppo": ("C0", "-"), "ppo": ("C1", "--"), "grpo": ("C2", ":")}


def main(directories: list[str]) -> None:
    """Draw ``docs/learning_curve.png`` and print a Markdown table, one row a run."""
    runs = defaultdict(list)
    for directory in map(Path, directories):
        config = yaml.safe_load((directory / "config.yaml").read_text())
        runs[config["algorithm"]].append((config["seed"], read_jsonl(directory / "metrics.jsonl")))
    figure, (rewards, accuracy) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    print("| algorithm | seeds | before | after, by seed | median gain |\n|---|---|---|---|---|")
    for algorithm, members in runs.items():
        color, line = STYLES[algorithm]
        befores, afters = [], []
        for number, (_, rows) in enumerate(sorted(members, key=lambda member: member[0])):
            label = f"{algorithm} ({len(members)} seed{'s' if len(members) > 1 else ''})" if number == 0 else None
            style = {"color": color, "linestyle": line, "alpha": 0.8, "linewidth": 1.3}
            steps = [row for row in rows if "critic/score/mean" in row]
            evaluated = [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row]
            rewards.plot([r["step"] for r in steps], [r["critic/score/mean"] for r in steps], label=label, **style)
            accuracy.plot(*zip(*evaluated, strict=True), marker="o", markersize=4, label=label, **style)
            befores.append(evaluated[0][1])
            afters.append(evaluated[-1][1])
        gain = statistics.median(after - before for before, after in zip(befores, afters, strict=True))
        print(
            f"| `{algorithm}` | {len(members)} | {statistics.median(befores):.3f} "
            f"| {', '.join(f'{after:.3f}' for after in afters)} | {gain:+.3f} |"
        )
    rewards.set(title="mean reward of the sampled batch", xlabel="step")
    accuracy.set(title="held-out accuracy, 512 prompts × 4 samples", xlabel="step")
    for axis in (rewards, accuracy):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
