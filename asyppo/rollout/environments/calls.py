"""Calls of other people's code, side by side, each with a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any


class TimedOut(Exception):
    """A call was not over in time."""


class Calls:
    """Calls of ``functions``, at most ``workers`` at a time, each in a thread; they begin now, ``outcomes`` waits. With
    one worker and no ``timeout`` (seconds) they are over before this returns, in the caller's thread."""

    def __init__(self, functions: Sequence[Callable[[], Any]], workers: int, timeout: float | None = None):
        self.functions, self.timeout = functions, timeout
        self.found: list[Any] = [None] * len(functions)
        self.changed = threading.Condition()  # everything below is read and written under it
        self.started: dict[int, float] = {}
        """Of the calls that run: when they began."""
        self.waiting = 0
        """The first call that nobody has taken."""
        self.over = 0
        self.here = workers == 1 and timeout is None
        """Whether they are made in the caller's thread."""
        if self.here:
            self._work()
        else:
            self._start(min(workers, len(functions)))

    def outcomes(self) -> list[Any]:
        """Wait, and return what each call returned or raised, or ``TimedOut`` where it took too long: Python ends no
        thread, so such a call goes on, on its own."""
        with self.changed:
            while self.over < len(self.functions):
                left = None
                if self.timeout is not None and self.started:
                    left = max(0.0, min(self.started.values()) + self.timeout - time.monotonic())
                self.changed.wait(left)
                self._start(self._give_up())
        return self.found

    def _start(self, count: int) -> None:
        for _ in range(count):
            threading.Thread(target=self._work, daemon=True).start()  # as daemons, they do not hold up the end

    def _work(self) -> None:
        """Do one call after another, until there are no more, or the last was given up."""
        while True:
            with self.changed:
                if self.waiting == len(self.functions):
                    return
                number = self.waiting
                self.waiting += 1
                self.started[number] = time.monotonic()
                self.changed.notify()  # of a time limit that nobody knew
            outcome: Any
            try:
                outcome = self.functions[number]()
            except BaseException as error:
                if self.here and isinstance(error, KeyboardInterrupt):
                    raise
                outcome = error  # what ends a thread, such as exit(), would leave its call open for good
            with self.changed:
                if number not in self.started:
                    return  # somebody else has taken this thread's place
                self._finish(number, outcome)

    def _finish(self, number: int, outcome: Any) -> None:
        del self.started[number]
        self.found[number] = outcome
        self.over += 1
        self.changed.notify()

    def _give_up(self) -> int:
        """End the calls that take too long, and return how many."""
        if self.timeout is None:
            return 0
        now = time.monotonic()
        late = [number for number, start in self.started.items() if now - start >= self.timeout]
        for number in late:
            self._finish(number, TimedOut(f"not over after {self.timeout:g} s"))
        return len(late)
