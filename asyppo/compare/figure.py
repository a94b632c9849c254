"""Draws held-out accuracy of every arm, against steps and against time, and what its critics did on the way."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from asyppo.compare.summary import DIAGNOSTICS, ArmSummary, estimate

DASHES = ("-", "--", "-.", ":")


def _style(number: int) -> dict[str, Any]:
    """Different dashes, too, so that colour is not needed to tell arms apart."""
    return {"color": f"C{number % 10}", "linestyle": DASHES[(number // 10 + number) % len(DASHES)]}


def draw(summaries: list[ArmSummary], image: Path) -> None:
    """Write a PNG: accuracy's mean over seeds with its 95 % interval, and every arm's difference to the reference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_step, by_time, differences) = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")
    by_time.sharey(by_step)
    for number, arm in enumerate(arm for arm in summaries if arm.curves):
        style = _style(number)
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
    _draw_differences([arm for arm in summaries if arm.curves], differences)
    figure.savefig(image, dpi=100)
    plt.close(figure)


def _draw_differences(arms: list[ArmSummary], axis: Any) -> None:
    """Each arm's final accuracy minus the reference's, with its interval and, grey, what the seeds could have found."""
    for number, arm in enumerate(arms):
        if arm.difference is None:
            continue
        mean, half_width = arm.difference.estimate.mean, arm.difference.estimate.half_width
        if math.isfinite(half_width):
            axis.barh(number, 2 * arm.difference.detectable, left=-arm.difference.detectable, color="0.9", height=0.8)
            axis.errorbar(mean, number, xerr=half_width, color=_style(number)["color"], capsize=3)
        axis.plot(mean, number, "o", color=_style(number)["color"])
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axis.set_ylim(max(1, len(arms)) - 0.5, -0.5)
    axis.use_sticky_edges = False
    axis.autoscale(axis="x")
    reference = next((arm.name for arm in arms if arm.difference is None), "the reference")
    axis.set(title="difference at the end, paired by seed", xlabel=f"accuracy minus {reference}; grey: not detectable")


def draw_diagnostics(summaries: list[ArmSummary], image: Path) -> None:
    """Write a PNG: each diagnostic over training, a panel each, a line for every arm that has it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms = [arm for arm in summaries if arm.curves]
    names = [name for name in DIAGNOSTICS if any(arm.over_training[name] for arm in arms)]
    columns = 4
    rows = max(1, math.ceil(len(names) / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        for number, arm in enumerate(arms):
            if series := arm.over_training[name]:
                axis.plot(*zip(*series, strict=True), label=arm.name, linewidth=1.5, **_style(number))
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("training step")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    lines = {label: line for a in axes.flat for line, label in zip(*a.get_legend_handles_labels(), strict=True)}
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(image, dpi=100)
    plt.close(figure)
