"""From finished runs to numbers: mean and interval over seeds, and differences paired by seed."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyppo.algorithm.student import quantile
from asyppo.compare.grid import Grid, Run
from asyppo.compare.runner import finished, run_path
from asyppo.run.directory import read_jsonl

CONFIDENCE, POWER = 0.95, 0.8
PARTS = 10  # of training, over each of which a diagnostic is averaged
DIAGNOSTICS = {
    "explained variance of V̄": r"critic/vf_explained_var",
    "of each critic": r"critic/\d+/vf_explained_var",
    "σ": r"critic/std/mean",
    "σ, edge of the advantage mask": r"critic/std/low",
    "σ, edge of the entropy filter": r"critic/std/high",
    "advantage masked of 1st tokens": r"actor/adv_mask_frac/tokens_1",
    "of 2nd tokens": r"actor/adv_mask_frac/tokens_2",
    "masked share of advantages": r"actor/adv_mask_advantage_frac",
    "corr(σ, error of V̄)": r"critic/std/corr_abs_error",
    "corr(σ, entropy)": r"critic/std/corr_entropy",
    "gradient masked (advantage)": r"actor/adv_mask_grad_frac",
    "gradient filtered (entropy)": r"actor/entropy_filter_grad_frac",
    "entropy": r"actor/entropy",
}
"""Column of the diagnostics table, and a pattern of the metrics averaged in it."""

Series = list[tuple[float, float]]
"""Step, and mean over runs and the steps around it."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval (Student's t); NaN width for one seed."""

    mean: float
    half_width: float


@dataclass(frozen=True)
class Difference:
    """An arm's final accuracy minus the reference's, paired by seed."""

    estimate: Estimate
    detectable: float
    """The least true difference that these seeds find at the 5 % level in 80 % of repetitions, by their spread."""
    seeds: int


@dataclass(frozen=True)
class Curve:
    """Held-out accuracy of one run."""

    seed: int
    steps: list[int]
    seconds: list[float]
    """Time in training steps up to each evaluation; evaluations, checkpoints and diagnostics are not in it."""
    accuracy: list[float]


@dataclass(frozen=True)
class ArmSummary:
    """What the finished runs of an arm came to."""

    name: str
    curves: list[Curve]
    final: Estimate | None
    gain: Estimate | None
    difference: Difference | None
    seconds_per_step: float | None
    diagnostics: dict[str, float | None]
    """Mean over the last half of the steps; None where the arm has no such metric."""
    over_training: dict[str, Series]


def estimate(values: list[float]) -> Estimate:
    """Return the mean of ``values`` and half its interval's width."""
    count = len(values)
    if count < 2:
        return Estimate(statistics.fmean(values), math.nan)
    error = statistics.stdev(values) / math.sqrt(count)
    return Estimate(statistics.fmean(values), quantile(0.5 + CONFIDENCE / 2, count - 1) * error)


def paired_difference(arm: dict[int, float], reference: dict[int, float]) -> Difference | None:
    """Compare two arms on the seeds that both have; None without one."""
    seeds = sorted(arm.keys() & reference.keys())
    if not seeds:
        return None
    differences = [arm[seed] - reference[seed] for seed in seeds]
    detectable = math.nan
    if len(seeds) > 1:
        quantiles = quantile(0.5 + CONFIDENCE / 2, len(seeds) - 1) + quantile(POWER, len(seeds) - 1)
        detectable = quantiles * statistics.stdev(differences) / math.sqrt(len(seeds))
    return Difference(estimate(differences), detectable, len(seeds))


def read_curve(directory: Path, seed: int, last: int) -> tuple[Curve, list[dict[str, Any]]]:
    """Return a run's accuracy over steps and time, and its rows of metrics, up to step ``last``."""
    rows = [row for row in read_jsonl(directory / "metrics.jsonl") if row["step"] <= last]
    steps, seconds, accuracy, passed = [], [], [], 0.0
    for row in rows:
        passed += _seconds(row)
        if row.get("eval/accuracy") is not None:
            steps.append(row["step"])
            seconds.append(passed)
            accuracy.append(row["eval/accuracy"])
    return Curve(seed, steps, seconds, accuracy), rows


def _seconds(row: dict[str, Any]) -> float:
    """Time of a step without what only watches it."""
    return (row.get("timing_s/step") or 0.0) - (row.get("timing_s/diagnostics") or 0.0)


def summarize(grid: Grid, out: Path) -> list[ArmSummary]:
    """Summarise the finished runs of every arm, in the grid's order."""
    finals: dict[str, dict[int, float]] = {}
    read: dict[str, list[tuple[Curve, list[dict[str, Any]]]]] = {}
    for arm in grid.arms:
        done = [seed for seed in grid.seeds if finished(out, Run(arm, seed), grid)]
        last = grid.steps(arm)
        read[arm] = [read_curve(run_path(out, Run(arm, seed)), seed, last) for seed in done]
        read[arm] = [(curve, rows) for curve, rows in read[arm] if curve.accuracy]
        finals[arm] = {curve.seed: curve.accuracy[-1] for curve, _ in read[arm]}
    return [_summarize_arm(arm, read[arm], finals, grid.reference) for arm in grid.arms]


def _summarize_arm(
    arm: str,
    read: list[tuple[Curve, list[dict[str, Any]]]],
    finals: dict[str, dict[int, float]],
    reference: str,
) -> ArmSummary:
    curves = [curve for curve, _ in read]
    from_start = [c for c in curves if c.steps[0] == 0]
    durations = [_seconds(row) for _, rows in read for row in rows if "timing_s/step" in row]
    return ArmSummary(
        name=arm,
        curves=curves,
        final=estimate([c.accuracy[-1] for c in curves]) if curves else None,
        gain=estimate([c.accuracy[-1] - c.accuracy[0] for c in from_start]) if from_start else None,
        difference=None if arm == reference else paired_difference(finals[arm], finals[reference]),
        seconds_per_step=statistics.median(durations) if durations else None,
        diagnostics={name: _mean_of(pattern, [rows for _, rows in read]) for name, pattern in DIAGNOSTICS.items()},
        over_training={name: _series(pattern, [rows for _, rows in read]) for name, pattern in DIAGNOSTICS.items()},
    )


def _mean_of(pattern: str, runs: list[list[dict[str, Any]]]) -> float | None:
    """Mean of the metrics of that name over the last half of each run's steps, over runs; None if there is none."""
    means = []
    for rows in runs:
        late = [value for step, value in _logged(pattern, rows) if step > rows[-1]["step"] / 2]
        if late:
            means.append(statistics.fmean(late))
    return statistics.fmean(means) if means else None


def _series(pattern: str, runs: list[list[dict[str, Any]]]) -> Series:
    """The metrics of that name over training: the mean step and the mean value of each part of it that has any."""
    last = max((rows[-1]["step"] for rows in runs), default=0)
    parts: list[list[tuple[int, float]]] = [[] for _ in range(PARTS)]
    for rows in runs:
        for step, value in _logged(pattern, rows):
            parts[(step - 1) * PARTS // last].append((step, value))
    return [(statistics.fmean(s for s, _ in part), statistics.fmean(v for _, v in part)) for part in parts if part]


def _logged(pattern: str, rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Every value of the metrics of that name, with its step."""
    return [
        (r["step"], v) for r in rows if r["step"] for k, v in r.items() if v is not None and re.fullmatch(pattern, k)
    ]


def markdown(summaries: list[ArmSummary], reference: str) -> str:
    """Return the tables: accuracy and differences, then what critics and masks did."""
    lines = [
        f"| arm | seeds | held-out accuracy | gain | minus {reference}, paired | detectable | s a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in summaries:
        difference = arm.difference
        lines.append(
            f"| {arm.name} | {len(arm.curves)} | {_show(arm.final)} | {_show(arm.gain, sign=True)} "
            f"| {_show(difference.estimate if difference else None, sign=True)} "
            f"| {_number(difference.detectable if difference else None)} | {_number(arm.seconds_per_step, 2)} |"
        )
    names = [name for name in DIAGNOSTICS if any(arm.diagnostics[name] is not None for arm in summaries)]
    lines += ["", "| arm | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for arm in summaries:
        lines.append(f"| {arm.name} | " + " | ".join(_number(arm.diagnostics[name]) for name in names) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _show(value: Estimate | None, sign: bool = False) -> str:
    if value is None:
        return "–"
    mean = f"{value.mean:+.3f}" if sign else f"{value.mean:.3f}"
    return mean if math.isnan(value.half_width) else f"{mean} ± {value.half_width:.3f}"
