"""Runs the cells of a grid, several at a time, each in a process of its own that can be stopped and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml

from asyppo.compare.grid import Grid, Run
from asyppo.config import ConfigError, load_config
from asyppo.run.directory import run_path as resumable

POLL_SECONDS = 0.5


def run_path(out: Path, run: Run) -> Path:
    """Return the directory of a run."""
    return out / "runs" / run.name


def last_step(out: Path, run: Run) -> int:
    """Return the number of steps that a run has logged."""
    metrics = run_path(out, run) / "metrics.jsonl"
    # The last line may be half written.
    whole = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0


def finished(out: Path, run: Run, grid: Grid) -> bool:
    """Whether a run has done its last step and saved the checkpoint of it."""
    steps = grid.steps(run.arm)
    return last_step(out, run) >= steps and (run_path(out, run) / f"checkpoint-{steps}").exists()


def check_runs(grid: Grid, out: Path) -> None:
    """Raise ConfigError where a run in ``out`` was made with other settings than the grid's."""
    for arm, settings in grid.arms.items():
        config = replace(load_config(settings), output_dir=str(out / "runs"), resume=True)
        for seed in grid.seeds:
            try:
                resumable(replace(config, seed=seed, run_name=Run(arm, seed).name))
            except ConfigError as error:
                raise ConfigError(f"arms: {arm}: {error}") from error


def run_grid(
    grid: Grid, out: Path, jobs: int, *, stopped: Callable[[], bool], progress: Callable[[int, str], None]
) -> dict[Run, str]:
    """Run what is not finished, ``jobs`` runs at a time, and return what went wrong, by run.

    A run that fails does not stop the others. Once ``stopped()`` is true no run is started, and those that go on end
    after their step, with a checkpoint. ``progress`` gets the number of steps done in all and the names of what runs,
    about every half second.
    """
    waiting = [run for run in grid.runs if not finished(out, run, grid)]
    running: dict[Run, subprocess.Popen] = {}
    failed: dict[Run, str] = {}
    told = False
    steps = {run: last_step(out, run) for run in grid.runs}
    while running or (waiting and not stopped()):
        while waiting and len(running) < jobs and not stopped():
            run = waiting.pop(0)
            running[run] = _start(grid, out, run, jobs)
        time.sleep(POLL_SECONDS)
        if stopped() and not told:
            told = True
            for process in running.values():
                process.terminate()  # not SIGINT, which a process started in the background is made to ignore
        for run, process in list(running.items()):
            ended = process.poll() is not None
            steps[run] = last_step(out, run)
            if ended:
                del running[run]
                if process.returncode and not told:
                    failed[run] = _last_line(log_path(out, run)) or f"exit status {process.returncode}"
        progress(sum(steps.values()), ", ".join(run.name for run in running))
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
    log = log_path(out, run)
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with open(log, "a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "asyppo", "train", "--config", str(config), "--resume"],
            stdout=output,
            stderr=subprocess.STDOUT,
            # One process a core: more threads than cores only wait for each other.
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))},
            start_new_session=True,  # an interrupt at the terminal reaches it once, from here
        )


def log_path(out: Path, run: Run) -> Path:
    """Return the file with what a run printed."""
    return out / "logs" / f"{run.name}.txt"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
