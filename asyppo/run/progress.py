"""Where a run is: seconds by phase, and a display of progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from asyppo.distributed.processes import rank

PLAIN_WIDTH = 120
"""Columns of what is printed where there is no terminal."""


class Timer:
    """Seconds spent in each phase of a step, as ``timing_s/{phase}``; waits for the GPU so that they are its own."""

    clock = staticmethod(time.perf_counter)
    """What seconds are read from."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        start = self.clock()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            key = f"timing_s/{name}"
            self.seconds[key] = self.seconds.get(key, 0.0) + self.clock() - start


def say(*lines: str, stream: TextIO | None = None) -> None:
    """Print ``lines`` where the display of progress is; of several ranks the first does."""
    if rank() == 0:
        print(*lines, sep="\n", file=stream or sys.stderr, flush=True)


class ProgressDisplay:
    """A bar with the time left on a terminal; elsewhere one plain line an update, with the same facts. Of
    several ranks the first shows it.

    ``seconds``: nothing is shown before so many have passed, and no plain line sooner after another, so that what is
    quick stays quiet.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        done: int = 0,
        every: int = 1,
        seconds: float = 0.0,
        stream: TextIO | None = None,
    ):
        self.title, self.total, self.every, self.seconds = title, total, every, seconds
        self.stream = stream or sys.stderr
        self.start = self.last = time.perf_counter()
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
        if self.bar is not None and not self.seconds:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, note: str = "", *, count: int = 1) -> None:
        """Count one more, or ``count``, of ``total`` as done."""
        self.done += count
        now = time.perf_counter()
        waited = now - self.last >= self.seconds
        if self.bar is not None:
            if waited:
                self.bar.start()  # nothing where it has started
            self.bar.update(self.task, advance=count, note=note)
        elif waited and (self.done // self.every > (self.done - count) // self.every or (count and self._complete)):
            self.last = now
            elapsed = now - self.start
            # A run that goes on can take steps back that had been counted.
            left = elapsed / max(self.done - self.done_before, 1) * (self.total - self.done)
            say(
                f"{self.title} {self.done}/{self.total}  {_clock(elapsed)} elapsed, {_clock(left)} left  {note}",
                stream=self.stream,
            )

    @property
    def _complete(self) -> bool:
        return self.done == self.total

    def show(self, renderable: RenderableType) -> None:
        """Print something of rich's, above the bar where there is one."""
        if self.bar is not None:
            self.bar.console.print(renderable)
        elif rank() == 0:
            Console(file=self.stream, width=PLAIN_WIDTH).print(renderable)
            self.stream.flush()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
