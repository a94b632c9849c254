"""A run's directory and what is written to it while the run goes on."""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from asyppo.config import AsyPPOConfig, ConfigError


def new_run_path(config: AsyPPOConfig) -> Path:
    """Return where a run will write. Raises ConfigError if its name is taken."""
    name = config.run_name or f"{config.algorithm}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    path = Path(config.output_dir).expanduser() / name
    if path.exists():
        raise ConfigError(f"run_name: {path} exists, needs a new name")
    return path


class RunDirectory:
    """``config.yaml``, ``metrics.jsonl`` and ``samples.jsonl`` of one run; report and checkpoints lie beside them."""

    def __init__(self, config: AsyPPOConfig):
        self.path = new_run_path(config)
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"output_dir: cannot make {self.path}: {error.strerror}") from error
        with open(self.path / "config.yaml", "w") as file:
            yaml.safe_dump(asdict(config), file, sort_keys=False)

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object a sample: step, split, prompt, completion, reward."""
        return self.path / "samples.jsonl"

    def log_metrics(self, row: dict[str, float]) -> None:
        """Append a row to ``metrics.jsonl``."""
        _append(self.metrics, [row])

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to ``samples.jsonl``."""
        _append(self.samples, rows)


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps({key: _json(value) for key, value in row.items()}) + "\n" for row in rows)


def _json(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file."""
    with open(path) as file:
        return [json.loads(line) for line in file]


class Timer:
    """Seconds spent in each phase of a step, as ``timing_s/{phase}``; waits for the GPU so that they are its own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            key = f"timing_s/{name}"
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start


class ProgressDisplay:
    """A bar with the time left on a terminal; elsewhere one plain line an update, with the same facts."""

    def __init__(self, title: str, total: int, *, every: int = 1, stream: TextIO | None = None):
        self.title, self.total, self.every = title, total, every
        self.stream = stream or sys.stderr
        self.start = time.perf_counter()
        self.done = 0
        self.bar: Progress | None = None
        if self.stream.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(file=self.stream),
            )
            self.task = self.bar.add_task(title, total=total, note="")

    def __enter__(self) -> ProgressDisplay:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, note: str = "", *, count: int = 1) -> None:
        """Count one more, or ``count``, of ``total`` as done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(self.task, advance=count, note=note)
        elif self.done % self.every == 0 or self.done == self.total:
            elapsed = time.perf_counter() - self.start
            left = elapsed / self.done * (self.total - self.done)
            print(
                f"{self.title} {self.done}/{self.total}  {_clock(elapsed)} elapsed, {_clock(left)} left  {note}",
                file=self.stream,
                flush=True,
            )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
