"""Draws held-out accuracy of every arm, against steps and against time."""

from __future__ import annotations

import statistics
from pathlib import Path

from asyppo.compare.summary import ArmSummary, estimate

DASHES = ("-", "--", "-.", ":")


def draw(summaries: list[ArmSummary], image: Path) -> None:
    """Write a PNG: mean over seeds with its 95 % interval, each seed as a thin line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for number, arm in enumerate(arm for arm in summaries if arm.curves):
        # Different dashes, too, so that colour is not needed to tell arms apart.
        style = {"color": f"C{number % 10}", "linestyle": DASHES[number // 10 + number % len(DASHES)]}
        steps = sorted(set.intersection(*(set(curve.steps) for curve in arm.curves)))
        accuracy = [[dict(zip(c.steps, c.accuracy, strict=True))[step] for c in arm.curves] for step in steps]
        seconds = [
            statistics.fmean(dict(zip(c.steps, c.seconds, strict=True))[step] for c in arm.curves) for step in steps
        ]
        estimates = [estimate(values) for values in accuracy]
        means = [e.mean for e in estimates]
        for axis, along in ((by_step, steps), (by_time, seconds)):
            axis.plot(along, means, label=f"{arm.name} ({len(arm.curves)})", linewidth=1.8, **style)
            axis.fill_between(
                along,
                [e.mean - e.half_width for e in estimates],
                [e.mean + e.half_width for e in estimates],
                color=style["color"],
                alpha=0.10,
                linewidth=0,
            )
    by_step.set(title="by step", xlabel="training step", ylabel="held-out accuracy")
    by_time.set(title="by time in training steps", xlabel="seconds, mean over seeds")
    for axis in (by_step, by_time):
        axis.grid(alpha=0.3)
    if by_step.lines:
        by_step.legend(fontsize=8, title="arm (seeds)")
    figure.savefig(image, dpi=120)
    plt.close(figure)
