"""Curves of a run."""

from __future__ import annotations

import re
from pathlib import Path

from asyppo.run import read_jsonl

PANELS: dict[str, str] = {
    "accuracy and reward": r"eval/accuracy|critic/score/mean",
    "critics: loss": r"critic/\d+/vf_loss",
    "critics: explained variance of their mean": r"critic/vf_explained_var",
    "critics: disagreement σ": r"critic/std/(mean|low|high)",
    "policy: entropy": r"actor/entropy",
    "policy: KL and clipped share": r"actor/(ppo_kl|pg_clipfrac)",
    "shares of tokens": r"actor/(adv_mask_frac|entropy_keep_frac)",
    "response length": r"response_length/(mean|min|max)",
}
"""Title of a panel, and a pattern of the metrics in it."""
PHASES = ("gen", "reward", "old_log_prob", "ref", "update_critic", "values", "adv", "update_actor")


def plot_curves(metrics: Path, image: Path) -> None:
    """Draw the metrics of a ``metrics.jsonl`` over steps, and seconds by phase, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_jsonl(metrics)
    figure, axes = plt.subplots(3, 3, figsize=(15, 10), layout="constrained")
    everything = dict.fromkeys(name for row in rows for name in row)
    for axis, (title, pattern) in zip(axes.flat, PANELS.items(), strict=False):
        for name in filter(re.compile(pattern).fullmatch, everything):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                few = len(points) < len(rows) / 2
                axis.plot(*zip(*points, strict=True), "o-" if few else "-", label=name, markersize=4, linewidth=1.4)
        axis.set_title(title)
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend(fontsize=8)
        else:
            axis.text(0.5, 0.5, "not part of this run", ha="center", transform=axis.transAxes, color="gray")
    steps = [row for row in rows if "timing_s/step" in row]
    phases = [phase for phase in PHASES if any(f"timing_s/{phase}" in row for row in steps)]
    axis = axes.flat[-1]
    axis.stackplot(
        [row["step"] for row in steps],
        [[row.get(f"timing_s/{phase}", 0.0) for row in steps] for phase in phases],
        labels=phases,
    )
    axis.set_title("seconds a step, by phase")
    axis.set_xlabel("step")
    axis.legend(fontsize=7, ncols=2)
    figure.savefig(image, dpi=110)
    plt.close(figure)
