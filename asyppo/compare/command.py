"""The command: run what is missing, then write the table and the figure of what there is."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from asyppo.compare import figure
from asyppo.compare.grid import Grid, load_grid
from asyppo.compare.runner import check_runs, finished, last_step, log_path, run_grid
from asyppo.compare.summary import markdown, summarize
from asyppo.run.durable import as_json
from asyppo.run.progress import ProgressDisplay
from asyppo.run.signals import StopSignals


def compare(path: Path, out: Path, jobs: int | None = None) -> int:
    """Run the grid in ``path``, with everything it writes in ``out``, and return the exit status.

    Calling it again goes on where it stopped: finished runs are kept, others resume from their last checkpoint. Grids
    with the same ``out`` share the runs of arms and seeds that both have. ``jobs``: runs at a time; None takes one a
    core. For a grid in ``NAME.yaml``, finished or not, ``out`` gets ``NAME.md`` (tables), ``NAME.json`` (their data),
    ``NAME.png`` (accuracy) and ``NAME-diagnostics.png`` (critics over training). Raises ConfigError for a grid that
    cannot be read, and for a run in ``out`` that was made with other settings.
    """
    grid = load_grid(path)
    check_runs(grid, out)
    jobs = jobs or os.cpu_count() or 1
    total, done = sum(grid.steps(run.arm) for run in grid.runs), sum(last_step(out, r) for r in grid.runs)
    with (
        StopSignals("finishing the steps that run, and saving") as signals,
        ProgressDisplay("step", total, done=done, every=max(1, total // 200)) as progress,
    ):
        failed = run_grid(
            grid,
            out,
            jobs,
            stopped=lambda: signals.received is not None,
            progress=lambda steps, note: progress.advance(note, count=steps - progress.done),
        )
    write(grid, out, path.stem)
    for run, reason in failed.items():
        print(f"asyppo: error: run {run.name} failed: {reason}; see {log_path(out, run)}", file=sys.stderr)
    left = sum(not finished(out, run, grid) for run in grid.runs)
    if left:
        print(f"{left} of {len(grid.runs)} runs are not finished; the same command goes on", file=sys.stderr)
    return int(bool(failed)) if signals.received is None else 128 + signals.received


def write(grid: Grid, out: Path, name: str) -> None:
    """Write the table, the data and the figures of the finished runs, and print the table."""
    summaries = summarize(grid, out)
    table = markdown(summaries, grid.reference)
    out.mkdir(parents=True, exist_ok=True)
    text, data, image, diagnostics = (out / f"{name}{end}" for end in (".md", ".json", ".png", "-diagnostics.png"))
    text.write_text(table)
    data.write_text(
        json.dumps(as_json([asdict(summary) for summary in summaries]), indent=1, ensure_ascii=False) + "\n"
    )
    figure.draw(summaries, image)
    figure.draw_diagnostics(summaries, diagnostics)
    print(table, text, data, image, diagnostics, sep="\n")
