"""What the report draws: Plotly figures as plain data.

A colour is the name of a variable of ``page.css``, such as ``--series-1``; the page puts in the theme's own. Curves of
one run differ in colour and dash, runs in colour and marker, so that no difference rests on colour alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from asyppo.report.runs import Run, Sample

MAX_POINTS = 400
"""A longer curve is drawn as means over as many stretches of steps."""
COLUMNS = 40
"""Most columns of a distribution over training."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")
PATTERNS = ("", "/", "x", "-", ".", "\\", "|", "+")
INSIDE_A_STEP = (
    "gen",
    "reward",
    "old_log_prob",
    "ref",
    "update_critic",
    "values",
    "continuations",
    "adv",
    "update_actor",
)
"""Phases in the order of the loop; others that a run timed come after them."""


@dataclass
class Table:
    """Rows of text under a head of text."""

    head: list[str]
    rows: list[list[str]]


@dataclass
class Chart:
    """A figure with its title, what to read in it, and its numbers as a table."""

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    says: str = ""
    table: Table | None = None
    name: str = ""
    """Of the block of data in the page."""

    @property
    def figure(self) -> dict[str, Any]:
        """What Plotly takes."""
        return {"data": self.data, "layout": self.layout}


def number(value: float | None) -> str:
    """Return three significant digits, without an exponent where it can be helped."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e7:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:,.{min(digits, 6)}f}"
    return f"{value:.3g}"


def curves(
    title: str,
    runs: Sequence[Run],
    names: Sequence[str],
    metrics: dict[str, str],
    *,
    says: str = "",
    unit: str = "",
    zero: bool = False,
) -> Chart | None:
    """Return metrics over steps, None where no run has them. ``metrics`` gives each its name in the legend.

    Of mean, min and max, several runs show the mean. ``zero``: the axis begins at 0.
    """
    if len(runs) > 1:
        metrics = {key: name for key, name in metrics.items() if not key.endswith(("/min", "/max"))} or metrics
    data: list[dict[str, Any]] = []
    rows = []
    thinned = False
    for r, (run, name) in enumerate(zip(runs, names, strict=True)):
        for m, (metric, short) in enumerate(metrics.items()):
            steps, values = run.series(metric)
            if not steps:
                continue
            label = short if len(runs) == 1 else name if len(metrics) == 1 else f"{name}, {short}"
            rows.append([label, *map(number, (values[0], values[-1], min(values), max(values)))])
            every = math.ceil(len(steps) / MAX_POINTS)
            thinned |= every > 1
            line = curve(
                label,
                _thin(steps, every),
                _thin(values, every),
                color=r if len(runs) > 1 else m,
                dash=m,
                symbol=r,
                markers=len(runs) > 1 or len(steps) <= 12,
            )
            data.append(line if every > 1 else line | _interval(run, metric, steps, values))
    if not data:
        return None
    layout = {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": unit}, "rangemode": "tozero" if zero else "normal"},
        "showlegend": max(len(data), len(runs)) > 1,
    }
    if thinned:
        says = f"{says} Means over stretches of steps, {MAX_POINTS} a curve.".strip()
    return Chart(title, data, layout, says, Table(["", "first", "last", "lowest", "highest"], rows))


def bands(
    title: str,
    unit: str,
    runs: Sequence[Run],
    names: Sequence[str],
    read: Callable[[Sample], np.ndarray | None],
) -> Chart | None:
    """Return quantiles over training of what ``read`` gives; of several runs, median and quartiles."""
    data: list[dict[str, Any]] = []
    rows = []
    several = len(runs) > 1
    for r, (run, name) in enumerate(zip(runs, names, strict=True)):
        steps, gathered = [], []
        for center, members in _columns(s for s in run.samples if s.split == "train"):
            parts = [part for part in map(read, members) if part is not None]
            values = np.concatenate(parts) if parts else np.zeros(0)
            values = values[np.isfinite(values)]
            if len(values):
                steps.append(center)
                gathered.append(np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]))
        if not steps:
            continue
        quantiles = np.array(gathered)
        color = _color(r)
        if not several:
            data += _band(steps, quantiles[:, 0], quantiles[:, 4], "--series-1-faint", "5–95 %")
        data += _band(steps, quantiles[:, 1], quantiles[:, 3], f"{color}-soft", "" if several else "25–75 %")
        label = name if several else "median"
        data.append(curve(label, steps, quantiles[:, 2], color=r, symbol=r, width=2.2))
        for when, row in (("first", quantiles[0]), ("last", quantiles[-1])):
            rows.append([f"{name}, {when}" if several else when, *map(number, row)])
    if not data:
        return None
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": unit}}, "showlegend": True}
    return Chart(
        title,
        data,
        layout,
        "Median and quartiles of the responses in samples.jsonl." if several else "Of the responses in samples.jsonl.",
        Table(["", "5 %", "25 %", "median", "75 %", "95 %"], rows),
    )


def rewards(runs: Sequence[Run], names: Sequence[str]) -> Chart | None:
    """Return the rewards of sampled responses: shares by level where there are few, else quantiles."""
    scored = [[s for s in run.samples if s.split == "train" and math.isfinite(s.reward)] for run in runs]
    levels = sorted({s.reward for run_samples in scored for s in run_samples})
    if not levels:
        return None
    if len(levels) > 6:
        return bands("Rewards of responses", "reward", runs, names, lambda s: np.array([s.reward]))
    data: list[dict[str, Any]] = []
    if len(runs) > 1:
        for r, (samples, name) in enumerate(zip(scored, names, strict=True)):
            columns = _columns(samples)
            share = [sum(s.reward == levels[-1] for s in members) / len(members) for _, members in columns]
            if share:
                data.append(curve(name, [center for center, _ in columns], share, color=r, symbol=r))
        title = f"Share of responses with reward {levels[-1]:g}"
        layout: dict[str, Any] = {
            "xaxis": {"title": {"text": "step"}},
            "yaxis": {"title": {"text": "share"}, "range": [0, 1]},
            "showlegend": True,
        }
        rows = [[str(trace["name"]), number(trace["y"][0]), number(trace["y"][-1])] for trace in data]
        return Chart(title, data, layout, "Of those in samples.jsonl.", Table(["", "first", "last"], rows))
    columns = _columns(scored[0])
    for i, level in enumerate(levels):
        share = [sum(s.reward == level for s in members) / len(members) for _, members in columns]
        data.append(
            {
                "type": "bar",
                "name": f"reward {level:g}",
                "x": [center for center, _ in columns],
                "y": plain(share),
                "marker": {
                    "color": f"--level-{round(1 + 5 * i / max(len(levels) - 1, 1))}",
                    "pattern": _pattern(i),
                },
            }
        )
    table = Table(
        ["", "first", "last"], [[str(trace["name"]), number(trace["y"][0]), number(trace["y"][-1])] for trace in data]
    )
    layout = {
        "barmode": "stack",
        "bargap": 0.08,
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": "share of responses"}, "range": [0, 1]},
        "showlegend": True,
    }
    return Chart("Rewards of responses", data, layout, "Of the responses in samples.jsonl.", table)


def calibration(title: str, series: dict[str, tuple[np.ndarray, np.ndarray]], says: str) -> Chart | None:
    """Return mean outcome against mean prediction in ten bins of equal size, one curve a series."""
    data: list[dict[str, Any]] = []
    rows = []
    low, high = math.inf, -math.inf
    for i, (name, (predicted, outcome)) in enumerate(series.items()):
        if len(predicted) < 20:
            continue
        bins = np.array_split(np.argsort(predicted, kind="stable"), 10)
        x = np.array([predicted[b].mean() for b in bins])
        y = np.array([outcome[b].mean() for b in bins])
        low, high = min(low, x.min(), y.min()), max(high, x.max(), y.max())
        error = float(np.abs(x - y).mean())
        rows.append([name, f"{len(predicted):,}", number(error), number(float((predicted - outcome).mean()))])
        line = curve(name, plain(x), y, color=i, dash=i, symbol=i)
        data.append(line | {"hovertemplate": "V̄ %{x:.3f}, came to %{y:.3f}"})
    if not data:
        return None
    ends = plain(np.array([low, high]))
    data.insert(
        0,
        {
            "type": "scatter",
            "name": "calibrated",
            "x": ends,
            "y": ends,
            "mode": "lines",
            "line": {"color": "--muted", "dash": "dot", "width": 1.2},
            "hoverinfo": "skip",
        },
    )
    layout = {
        "xaxis": {"title": {"text": "predicted: V̄"}},
        "yaxis": {"title": {"text": "outcome: mean return"}},
        "showlegend": True,
        "hovermode": "closest",
    }
    return Chart(
        title,
        data,
        layout,
        f"{says} Ten bins of equally many tokens. Above the dotted line V̄ is too low.",
        Table(["", "tokens", "mean distance from the line", "mean of V̄ − outcome"], rows),
    )


def by_tenth(
    title: str,
    unit: str,
    samples: dict[str, list[Sample]],
    quantities: dict[str, Callable[[Sample], np.ndarray | None]],
    tenths: Callable[[list[Sample]], list[np.ndarray]],
    says: str,
) -> Chart | None:
    """Return means of per-token quantities by tenths of the tokens, one curve a run and quantity.

    ``tenths`` gives each response's tokens their number from 0 to 9, -1 for none: ``response_tenths`` or
    ``disagreement_tenths``, whose docstring names the axis.
    """
    data, rows = [], []
    middles = [10 * i + 5 for i in range(10)]
    for r, (name, run_samples) in enumerate(samples.items()):
        places = tenths(run_samples)
        for q, (quantity, read) in enumerate(quantities.items()):
            total, count = np.zeros(10), np.zeros(10)
            for sample, place in zip(run_samples, places, strict=True):
                values = read(sample)
                if values is None:
                    continue
                valid = np.isfinite(values) & (place >= 0)
                total += np.bincount(place[valid], weights=values[valid], minlength=10)
                count += np.bincount(place[valid], minlength=10)
            if not count.any():
                continue
            mean = np.divide(total, count, out=np.full(10, math.nan), where=count > 0)
            label = quantity if len(samples) == 1 else name if len(quantities) == 1 else f"{name}, {quantity}"
            rows.append([label, *map(number, mean.tolist())])
            kind = r if len(samples) > 1 else q
            data.append(curve(label, middles, mean, color=kind, dash=q, symbol=kind))
    if not data:
        return None
    layout = {
        "xaxis": {"title": {"text": tenths.__doc__}, "ticksuffix": " %", "range": [0, 100], "dtick": 25},
        "yaxis": {"title": {"text": unit}, "rangemode": "tozero"},
        "showlegend": max(len(data), len(samples)) > 1,
    }
    return Chart(title, data, layout, says, Table(["", *(f"{m - 5}–{m + 5} %" for m in middles)], rows))


def by_number(
    title: str, unit: str, runs: Sequence[Run], names: Sequence[str], metrics: dict[str, str]
) -> Chart | None:
    """Return means over the last third of training of metrics that are recorded by the token's number in the response,
    such as ``critic/std/tokens_5_8`` under ``critic/std``; one curve a run and metric."""
    ends = [key.split("/tokens_") for run in runs for row in run.metrics for key in row if "/tokens_" in key]
    places = sorted({end for metric, end in ends if metric in metrics}, key=lambda end: int(end.split("_")[-1]))
    head = [place.replace("_", "–") for place in places]
    data, rows = [], []
    for r, (run, name) in enumerate(zip(runs, names, strict=True)):
        for m, (metric, short) in enumerate(metrics.items()):
            series = [zip(*run.series(f"{metric}/tokens_{place}"), strict=True) for place in places]
            late = [[value for step, value in points if 3 * step > 2 * run.last_step] for points in series]
            if not any(late):
                continue
            means = [float(np.mean(values)) if values else math.nan for values in late]
            label = short if len(runs) == 1 else name if len(metrics) == 1 else f"{name}, {short}"
            rows.append([label, *map(number, means)])
            kind = r if len(runs) > 1 else m
            data.append(curve(label, head, means, color=kind, dash=m, symbol=kind))
    if not data:
        return None
    layout = {
        "xaxis": {"title": {"text": "number of the token in the response"}, "type": "category"},
        "yaxis": {"title": {"text": unit}, "rangemode": "tozero"},
        "showlegend": max(len(data), len(runs)) > 1,
    }
    return Chart(title, data, layout, "Of all tokens, last third of training.", Table(["", *head], rows))


def response_tenths(samples: list[Sample]) -> list[np.ndarray]:
    """position in the response"""
    return [10 * np.arange(len(s.tokens or ())) // max(len(s.tokens or ()), 1) for s in samples]


def disagreement_tenths(samples: list[Sample]) -> list[np.ndarray]:
    """rank of σ among the tokens of its step"""
    places = [np.full(len(s.tokens or ()), -1) for s in samples]
    for step in {s.step for s in samples}:
        members = [i for i, s in enumerate(samples) if s.step == step and "std" in s.columns]
        if not members:
            continue
        std = np.concatenate([samples[i].columns["std"] for i in members])
        place = np.full(len(std), -1)
        order = np.argsort(std, kind="stable")[: np.isfinite(std).sum()]  # NaN comes last
        place[order] = 10 * np.arange(len(order)) // max(len(order), 1)
        ends = np.cumsum([len(places[i]) for i in members])
        for i, part in zip(members, np.split(place, ends[:-1]), strict=True):
            places[i] = part
    return places


def phases(runs: Sequence[Run], names: Sequence[str]) -> Chart | None:
    """Return seconds by phase as stacked bars: over steps for one run, means of a step for several."""
    found = dict.fromkeys(
        key.removeprefix("timing_s/")
        for run in runs
        for row in run.metrics
        for key, value in row.items()
        if key.startswith("timing_s/") and key != "timing_s/step" and value
    )
    order = [phase for phase in INSIDE_A_STEP if phase in found] + [p for p in found if p not in INSIDE_A_STEP]
    timed = [[row for row in run.metrics if row.get("timing_s/step") is not None] for run in runs]
    if not order or not any(timed):
        return None
    if len(runs) == 1:
        every = math.ceil(len(timed[0]) / (2 * COLUMNS))
        parts = [timed[0][i : i + every] for i in range(0, len(timed[0]), every)]
        x: list[Any] = [float(np.mean([row["step"] or 0 for row in part])) for part in parts]
    else:
        parts, x = timed, list(names)
    data, rows = [], []
    for i, phase in enumerate(order):
        seconds = [float(np.mean([row.get(f"timing_s/{phase}") or 0.0 for row in part] or [0.0])) for part in parts]
        overall = [row.get(f"timing_s/{phase}") or 0.0 for run_samples in timed for row in run_samples]
        rows.append([phase, number(float(np.mean(overall))), number(float(np.sum(overall)))])
        bar: dict[str, Any] = {"type": "bar", "name": phase, "marker": {"color": _color(i), "pattern": _pattern(i)}}
        # Names of runs need the width of the chart, steps its height.
        lying = {"orientation": "h", "y": x, "x": plain(seconds)}
        data.append(bar | (lying if len(runs) > 1 else {"x": x, "y": plain(seconds)}))
    steps, axis = {"title": {"text": "step"}}, {"title": {"text": "seconds a step"}}
    layout = {
        "barmode": "stack",
        "bargap": 0.08 if len(runs) == 1 else 0.3,
        "xaxis": steps if len(runs) == 1 else axis,
        "yaxis": axis if len(runs) == 1 else {"autorange": "reversed"},
        "showlegend": True,
        "hovermode": "x unified" if len(runs) == 1 else "y unified",
    }
    says = "Evaluation and saving count in the step that did them."
    return Chart("Time by phase", data, layout, says, Table(["", "seconds a step", "seconds in all"], rows))


def common_tokens(samples: Iterable[Sample]) -> Table | None:
    """Return the ten tokens of highest and the ten of lowest mean σ, of those that occur at least ten times."""
    texts, count, sums = _by_token(samples)
    std, masked, filtered = sums / np.maximum(count, 1)
    order = [c for c in np.argsort(-std, kind="stable") if count[c] >= 10]
    chosen = order if len(order) <= 20 else [*order[:10], *order[-10:]]
    rows = [
        [_quoted(texts[c]), f"{count[c]:,}", number(std[c]), f"{masked[c]:.0%}", f"{filtered[c]:.0%}"] for c in chosen
    ]
    return Table(["token", "times", "mean σ", "advantage masked", "entropy filtered"], rows) if rows else None


def masked_tokens(samples: Iterable[Sample]) -> Table | None:
    """Return the tokens that make up most of what a mask takes, ten at most of each mask, with their share of it and of
    all tokens; None where the masks take nothing."""
    texts, count, (_, masked, filtered) = _by_token(samples)
    shares = [part / max(part.sum(), 1) for part in (count, masked, filtered)]
    most = [[c for c in np.argsort(-share, kind="stable")[:10] if share[c] > 0] for share in shares[1:]]
    rows = [
        [_quoted(texts[c]), f"{count[c]:,}", *(f"{share[c]:.1%}" for share in shares)]
        for c in dict.fromkeys([*most[0], *most[1]])
    ]
    head = ["token", "times", "of all tokens", "of masked advantages", "of filtered entropies"]
    return Table(head, rows) if rows else None


def _by_token(samples: Iterable[Sample]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the different tokens with a σ, how often each occurs [n], and the sums of its σ and of how often its
    advantage was masked and its entropy filtered [3, n]."""
    codes: dict[str, int] = {}
    sample_codes: list[np.ndarray] = [np.zeros(0, dtype=int)]
    columns: list[np.ndarray] = [np.zeros((3, 0))]
    for sample in samples:
        std = sample.columns.get("std")
        if std is None or sample.tokens is None:
            continue
        no_flags = np.zeros(len(std))
        masked, filtered = (dropped(sample, flag) for flag in ("advantage_keep", "entropy_keep"))
        columns.append(
            np.stack([std, no_flags if masked is None else masked, no_flags if filtered is None else filtered])
        )
        sample_codes.append(np.array([codes.setdefault(token, len(codes)) for token in sample.tokens], dtype=int))
    table, code = np.concatenate(columns, axis=1), np.concatenate(sample_codes)
    valid = np.isfinite(table[0])
    table, code = table[:, valid], code[valid]
    sums = np.stack([np.bincount(code, weights=row, minlength=len(codes)) for row in table])
    return list(codes), np.bincount(code, minlength=len(codes)), sums


def plain(values: Any) -> list[float | None]:
    """Return numbers as JSON takes them: six significant digits, None for what is not finite."""
    return [
        float(f"{value:.6g}") if math.isfinite(value) else None for value in np.asarray(values, dtype=float).tolist()
    ]


def _quoted(token: str) -> str:
    """A token as Python would write it, cut where it is long."""
    text = repr(token)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _color(i: int) -> str:
    return f"--series-{i % 8 + 1}"


def curve(
    name: str, x: Any, y: Any, *, color: int, dash: int = 0, symbol: int = 0, markers: bool = True, width: float = 1.8
) -> dict[str, Any]:
    """A curve; of many points, eight have a marker."""
    few = len(x) <= 12
    return {
        "type": "scatter",
        "name": name,
        "x": x,
        "y": plain(y),
        "mode": "lines+markers" if markers else "lines",
        "line": {"color": _color(color), "dash": DASHES[dash % len(DASHES)], "width": width},
        "marker": {"symbol": SYMBOLS[symbol % len(SYMBOLS)], "size": 7, "maxdisplayed": 0 if few else 8},
    }


def _interval(run: Run, metric: str, steps: list[int], values: list[float]) -> dict[str, Any]:
    """Bars from ``metric/ci_low`` to ``metric/ci_high`` at each point, where the run has both at all of them."""
    (at_low, low), (at_high, high) = (run.series(f"{metric}/ci_{end}") for end in ("low", "high"))
    if not at_low == at_high == steps:
        return {}
    over, under = plain(np.subtract(high, values)), plain(np.subtract(values, low))
    bars = {"type": "data", "symmetric": False, "array": over, "arrayminus": under, "thickness": 1.2, "width": 4}
    return {"error_y": bars}


def _pattern(i: int) -> dict[str, Any]:
    """Hatching in the colour of the panel, over a bar's own."""
    shape = PATTERNS[(i + i // 8) % len(PATTERNS)]  # after eight, colours begin again
    return {"shape": shape, "fillmode": "overlay", "fgcolor": "--panel", "fgopacity": 0.55, "size": 6, "solidity": 0.2}


def _band(x: list[Any], low: np.ndarray, high: np.ndarray, color: str, name: str) -> list[dict[str, Any]]:
    """Two traces that fill what is between them; without a name, the legend leaves them out."""
    edge: dict[str, Any] = {"type": "scatter", "x": x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    return [
        edge | {"y": plain(low), "showlegend": False},
        edge | {"y": plain(high), "name": name, "showlegend": bool(name), "fill": "tonexty", "fillcolor": color},
    ]


def _thin(values: list[Any], every: int) -> list[Any]:
    if every <= 1:
        return values
    return [float(np.mean(values[i : i + every])) for i in range(0, len(values), every)]


def _columns(samples: Iterable[Sample]) -> list[tuple[float, list[Sample]]]:
    """Samples by step, in at most ``COLUMNS`` stretches of steps, each with its middle."""
    by_step: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_step[sample.step].append(sample)
    steps = sorted(by_step)
    every = math.ceil(len(steps) / COLUMNS)
    parts = [steps[i : i + every] for i in range(0, len(steps), every or 1)]
    return [(float(np.mean(part)), [s for step in part for s in by_step[step]]) for part in parts]


def dropped(sample: Sample, flag: str) -> np.ndarray | None:
    keep = sample.flags.get(flag)
    if keep is None:
        return None
    return np.where(True if sample.policy is None else sample.policy, (~keep).astype(float), math.nan)
