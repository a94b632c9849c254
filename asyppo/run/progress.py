"""Where a run is: seconds by phase, and a display of progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from asyppo.distributed.processes import rank


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
    """A bar with the time left on a terminal; elsewhere one plain line an update, with the same facts. Of
    several ranks the first shows it."""

    def __init__(self, title: str, total: int, *, done: int = 0, every: int = 1, stream: TextIO | None = None):
        self.title, self.total, self.every = title, total, every
        self.stream = stream or sys.stderr
        self.start = time.perf_counter()
        self.done = self.done_before = done
        self.bar: Progress | None = None
        if self.stream.isatty() and rank() == 0:
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
            self.task = self.bar.add_task(title, total=total, completed=done, note="")

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
        elif rank() == 0 and (
            self.done // self.every > (self.done - count) // self.every or (count and self.done == self.total)
        ):
            elapsed = time.perf_counter() - self.start
            # A run that goes on can take steps back that had been counted.
            left = elapsed / max(self.done - self.done_before, 1) * (self.total - self.done)
            print(
                f"{self.title} {self.done}/{self.total}  {_clock(elapsed)} elapsed, {_clock(left)} left  {note}",
                file=self.stream,
                flush=True,
            )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
