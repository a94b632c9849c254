"""Curves of a run."""

from __future__ import annotations

from pathlib import Path

from asyppo.run import read_jsonl

PANELS: dict[str, tuple[str, ...]] = {
    "accuracy and reward": ("eval/accuracy", "critic/score/mean"),
    "critics: loss": ("critic/0/vf_loss", "critic/1/vf_loss", "critic/2/vf_loss", "critic/3/vf_loss"),
    "critics: explained variance": ("critic/vf_explained_var",),
    "critics: disagreement σ": ("critic/std/mean", "critic/std/low", "critic/std/high"),
    "policy: entropy": ("actor/entropy",),
    "policy: KL and clipped share": ("actor/ppo_kl", "actor/pg_clipfrac"),
    "shares of tokens": ("actor/adv_mask_frac", "actor/entropy_keep_frac"),
    "response length": ("response_length/mean", "response_length/min", "response_length/max"),
}
PHASES = ("gen", "reward", "old_log_prob", "ref", "update_critic", "values", "adv", "update_actor")


def plot_curves(metrics: Path, image: Path) -> None:
    """Draw the metrics of a ``metrics.jsonl`` over steps, and seconds by phase, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_jsonl(metrics)
    figure, axes = plt.subplots(3, 3, figsize=(15, 10), layout="constrained")
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=False):
        for name in names:
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
    axis = axes.flat[-1]
    axis.stackplot(
        [row["step"] for row in steps],
        [[row.get(f"timing_s/{phase}", 0.0) for row in steps] for phase in PHASES],
        labels=PHASES,
    )
    axis.set_title("seconds a step, by phase")
    axis.set_xlabel("step")
    axis.legend(fontsize=7, ncols=2)
    figure.savefig(image, dpi=110)
    plt.close(figure)
