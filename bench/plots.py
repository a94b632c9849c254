"""Plots of a result file: time as a multiple of the floor, peak memory, error, and growth with the work."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.results import Result, Row

OURS, THEIRS, LIMIT = "#0b6e4f", "#9aa5b1", "#c0392b"
COLUMNS = 2


def draw(result: Result, folder: Path, stem: str) -> list[Path]:
    """Write the plots of one run; return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{result['device']['name']}, {result['date'][:10]}"
    panels: list[tuple[str, str, Callable[[Row], float | None]]] = [
        ("time", "time as a multiple of the floor", lambda row: row["floor_multiple"]),
        ("memory", "peak memory beyond the inputs, MiB", lambda row: max(row.get("peak_bytes") or 0, 1) / 2**20),
        ("error", "error as a share of its limit", _share_of_limit),
    ]
    drawn = []
    for name, label, figure in panels:
        path = folder / f"{stem}-{name}.png"
        if _bars(result["cases"], f"{label}: {title}", figure, path, mark=name != "memory"):
            drawn.append(path)
    path = folder / f"{stem}-phases.png"
    if _phases(result["cases"], f"milliseconds by phase: {title}", path):
        drawn.append(path)
    path = folder / f"{stem}-scaling.png"
    if _curves(result["sweeps"], f"time against size, beside the floor (dashed): {title}", path):
        drawn.append(path)
    return drawn


def _share_of_limit(row: Row) -> float | None:
    shares = [e / row["limits"][name] for name, e in row["errors"].items() if e is not None and row["limits"][name]]
    return max(shares, default=None)


def _bars(
    cases: list[dict[str, Any]], title: str, figure: Callable[[Row], float | None], path: Path, *, mark: bool
) -> bool:
    """One panel a case, one bar a contender, smallest on top; ``mark``: a line at 1."""
    shown = []
    for case in cases:
        bars = [(figure(row), row) for row in case["rows"] if row["status"] == "ok"]
        bars = sorted(((x, row) for x, row in bars if x), key=lambda bar: bar[0])
        if bars:
            shown.append((case, bars))
    if not shown:
        return False
    axes = _grid(len(shown), title, height=0.6 + 0.3 * max(len(bars) for _, bars in shown))
    for axis, (case, bars) in zip(axes, shown, strict=True):
        colours = [OURS if row["ours"] else THEIRS for _, row in bars]
        drawn = axis.barh([row["contender"] for _, row in bars], [x for x, _ in bars], color=colours)
        axis.bar_label(drawn, labels=[f"{x:.3g}" for x, _ in bars], padding=3, fontsize=7)
        axis.invert_yaxis()
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis)
        low, high = min(x for x, _ in bars), max(x for x, _ in bars)
        axis.set_xlim(min(low, 1.0 if mark else low) / 1.5, max(high * 4, 1.5 if mark else 0.0))
        if mark:
            axis.axvline(1.0, color=LIMIT, linewidth=1, linestyle="--")
        axis.set_title(f"{case['op']}: {case['name']}", fontsize=9)
        axis.tick_params(labelsize=7)
    return _save(path)


def _phases(cases: list[dict[str, Any]], title: str, path: Path) -> bool:
    """One panel a case, one bar a contender, its phases one behind the other; fastest on top."""
    shown = [(case, [r for r in case["rows"] if r["status"] == "ok" and "phases" in r]) for case in cases]
    shown = [(case, rows) for case, rows in shown if rows]
    if not shown:
        return False
    axes = _grid(len(shown), title, height=1.2 + 0.3 * max(len(rows) for _, rows in shown))
    names = list(dict.fromkeys(name for _, rows in shown for row in rows for name in row["phases"]))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    for axis, (case, rows) in zip(axes, shown, strict=True):
        rows = sorted(rows, key=lambda row: row["seconds"]["median"])
        left = [0.0] * len(rows)
        for name in dict.fromkeys(name for row in rows for name in row["phases"]):
            widths = [1e3 * row["phases"].get(name, 0.0) for row in rows]
            axis.barh([row["contender"] for row in rows], widths, left=left, label=name, color=colours[name])
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.set_title(f"{case['op']}: {case['name']}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6, ncols=2)
    return _save(path)


def _curves(sweeps: list[dict[str, Any]], title: str, path: Path) -> bool:
    """One panel a sweep, one line a contender."""
    if not sweeps:
        return False
    axes = _grid(len(sweeps), title, height=2.6)
    for axis, sweep in zip(axes, sweeps, strict=True):
        points = sweep["points"]
        axis.plot([p["x"] for p in points], [1e3 * p["floor_seconds"] for p in points], color=LIMIT, linestyle="--")
        for name in dict.fromkeys(row["contender"] for p in points for row in p["rows"]):
            line = [
                (p["x"], 1e3 * row["seconds"]["median"])
                for p in points
                for row in p["rows"]
                if row["contender"] == name and row["status"] == "ok"
            ]
            if line:
                ours = name.startswith("asyppo")
                axis.plot(*zip(*line, strict=True), "o-" if ours else "s:", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks([p["x"] for p in points], [f"{p['x']:,}" for p in points])
        axis.minorticks_off()
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)
        axis.set_ylabel("milliseconds", fontsize=7)
        axis.set_title(f"{sweep['op']} against {sweep['axis']}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6)
    return _save(path)


def _plain_ticks(axis: Axis) -> None:
    """Label 1, 2 and 5 of few decades, or the decades of many, in plain figures."""

    def label(x: float, _: int) -> str:
        low, high = sorted(axis.get_view_interval())
        few = math.log10(high / low) < 2.5
        return f"{x:g}" if few or f"{x:e}".startswith("1.0") else ""

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(label))
    axis.set_minor_formatter(NullFormatter())


def _grid(count: int, title: str, height: float) -> list[Axes]:
    rows = -(-count // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(13, height * rows + 0.6), squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=11)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.axis("off")
    return flat[:count]


def _save(path: Path) -> bool:
    plt.savefig(path, dpi=110)
    plt.close()
    return True
