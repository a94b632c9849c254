"""Runs the cells of a grid, several at a time, each in a process of its own that can be stopped and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from asyppo.compare.grid import Grid, Run
from asyppo.run import read_jsonl

POLL_SECONDS = 0.5


class Stopped(Exception):
    """The user stopped the comparison; every run has saved what it had."""


def run_path(out: Path, run: Run) -> Path:
    """Return the directory of a run."""
    return out / "runs" / run.name


def last_step(out: Path, run: Run) -> int:
    """Return the number of steps that a run has logged."""
    metrics = run_path(out, run) / "metrics.jsonl"
    rows = read_jsonl(metrics) if metrics.exists() else []
    return rows[-1]["step"] if rows else 0


def finished(out: Path, run: Run, grid: Grid) -> bool:
    """Whether a run has done its last step and saved the checkpoint of it."""
    steps = grid.arms[run.arm]["max_steps"]
    return last_step(out, run) >= steps and (run_path(out, run) / f"checkpoint-{steps}").exists()


def run_grid(grid: Grid, out: Path, jobs: int, progress: Callable[[int, str], None]) -> dict[Run, str]:
    """Run what is not finished, ``jobs`` runs at a time, and return what went wrong, by run.

    A run that fails does not stop the others. ``progress`` gets the number of steps done in all and a note, about
    every half second. Raises Stopped on an interrupt, after the running ones have saved and ended.
    """
    waiting = [run for run in grid.runs if not finished(out, run, grid)]
    running: dict[Run, subprocess.Popen] = {}
    failed: dict[Run, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = _start(grid, out, run, jobs)
            time.sleep(POLL_SECONDS)
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    if process.returncode:
                        failed[run] = _last_line(_log(out, run)) or f"exit status {process.returncode}"
            done = sum(last_step(out, run) for run in grid.runs)
            progress(done, ", ".join(run.name for run in running))
    except KeyboardInterrupt as interrupt:
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()
        raise Stopped from interrupt
    finally:
        for process in running.values():
            if process.poll() is None:
                process.kill()
    return failed


def _start(grid: Grid, out: Path, run: Run, jobs: int) -> subprocess.Popen:
    """Start one run; it goes on from its last checkpoint if it has one."""
    config = out / "configs" / f"{run.name}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    settings = grid.arms[run.arm] | {
        "seed": run.seed,
        "output_dir": str(out / "runs"),
        "run_name": run.name,
    }
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    log = _log(out, run)
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with open(log, "a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "asyppo", "train", "--config", str(config), "--resume", "true"],
            stdout=output,
            stderr=subprocess.STDOUT,
            # One process a core: more threads than cores only wait for each other.
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))},
            start_new_session=True,  # an interrupt at the terminal reaches it once, from here
        )


def _log(out: Path, run: Run) -> Path:
    return out / "logs" / f"{run.name}.txt"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
