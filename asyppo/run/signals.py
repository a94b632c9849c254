"""SIGINT (Ctrl-C) and SIGTERM: stop after the step, or at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


def exit_at_once(number: int, frame: FrameType | None) -> None:
    """Handle a signal by leaving the process, with the status that a shell gives for it (130 for SIGINT, 143 for
    SIGTERM).

    Nothing is waited for: what is being written is whole or not there (``asyppo/run/durable.py``).
    """
    _say(f"{signal.Signals(number).name}: stopped at once")
    os._exit(128 + number)


def handle(handlers: dict[signal.Signals, Any]) -> dict[signal.Signals, Any]:
    """Set handlers of signals, and return those that were there. A signal that the process was started to ignore stays
    ignored; only the main thread can set any, elsewhere nothing happens."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in handlers}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handlers[number])
    return before


@contextmanager
def exiting_at_once() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM end the process at once, without a traceback."""
    before = handle(dict.fromkeys(STOPPING, exit_at_once))
    try:
        yield
    finally:
        handle(before)


class StopSignals:
    """While it is entered, the first SIGINT or SIGTERM is kept in ``received`` for the loop to look at; a second one
    does what it would have done before: leave at once, or raise KeyboardInterrupt where Python's own handler is
    set."""

    def __init__(self, doing: str = "finishing this step and saving") -> None:
        self.doing = doing
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._before = handle(dict.fromkeys(STOPPING, self._keep))
        return self

    def __exit__(self, *error: object) -> None:
        handle(self._before)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        handle(self._before)
        _say(f"{self.received.name}: {self.doing}; once more to stop at once")


def _say(text: str) -> None:
    """Print a line past Python's buffers, which the signal may have come in the middle of."""
    os.write(2, f"asyppo: {text}\n".encode())
