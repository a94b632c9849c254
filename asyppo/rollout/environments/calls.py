"""Calls of other people's code, side by side, each with a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


class TimedOut(Exception):
    """A call was not over in time."""


@dataclass
class _Calls:
    """Calls under way; everything is read and written under ``changed``."""

    functions: Sequence[Callable[[], Any]]
    outcomes: list[Any]
    changed: threading.Condition = field(default_factory=threading.Condition)
    started: dict[int, float] = field(default_factory=dict)
    """Of the calls that run: when they began."""
    waiting: int = 0
    """The first call that nobody has taken."""
    over: int = 0

    def work(self) -> None:
        """Do one call after another, until there are no more, or the last was given up."""
        while True:
            with self.changed:
                if self.waiting == len(self.functions):
                    return
                number = self.waiting
                self.waiting += 1
                self.started[number] = time.monotonic()
            outcome: Any
            try:
                outcome = self.functions[number]()
            except Exception as error:
                outcome = error
            with self.changed:
                if number not in self.started:
                    return  # somebody else has taken this thread's place
                self.finish(number, outcome)

    def finish(self, number: int, outcome: Any) -> None:
        del self.started[number]
        self.outcomes[number] = outcome
        self.over += 1
        self.changed.notify()

    def give_up(self, timeout: float | None) -> int:
        """End the calls that take longer, and return how many: their threads go on, and nobody waits for them."""
        if timeout is None:
            return 0
        now = time.monotonic()
        late = [number for number, start in self.started.items() if now - start >= timeout]
        for number in late:
            self.finish(number, TimedOut(f"not over after {timeout:g} s"))
        return len(late)

    def wait(self, timeout: float | None) -> None:
        """Wait until a call is over, or one has taken too long."""
        left = None
        if timeout is not None and self.started:
            left = max(0.0, min(self.started.values()) + timeout - time.monotonic())
        self.changed.wait(left)


def side_by_side(functions: Sequence[Callable[[], Any]], workers: int, timeout: float | None = None) -> list[Any]:
    """Call ``functions``, at most ``workers`` at once, and return what each returned or raised, or ``TimedOut`` where
    it took longer than ``timeout`` seconds: Python ends no thread, so such a call goes on, on its own."""
    if workers == 1 and timeout is None:
        return [_outcome(function) for function in functions]
    calls = _Calls(functions, [None] * len(functions))

    def start(count: int) -> None:
        for _ in range(count):
            threading.Thread(target=calls.work, daemon=True).start()  # as daemons, they do not hold up the end

    start(min(workers, len(functions)))
    with calls.changed:
        while calls.over < len(functions):
            calls.wait(timeout)
            start(calls.give_up(timeout))
    return calls.outcomes


def _outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return error
