"""Reward functions by name, and the process that runs one so that it can be cut off.

``python -m asyppo.rewards.worker FD REFERENCE`` is the other side of ``RewardProcess``. A process of its own, and not a
thread or an alarm: it can be ended whatever it is stuck in, compiled code included. It is started as a module, not by
``multiprocessing``, so that it never runs the caller's script a second time.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from asyppo.config import ConfigError
from asyppo.config.references import OF_A_FILE, in_one_line, load
from asyppo.rewards.logged import Logged


def reference_of(func: Callable[..., Any]) -> str:
    """Return what ``load`` finds ``func`` by in another process. Raises ConfigError if nothing does."""
    module, name = sys.modules.get(getattr(func, "__module__", "")), getattr(func, "__qualname__", "<none>")
    if module is None or module.__name__ == "__main__" or "<" in name:  # as in <locals> and <lambda>
        raise ConfigError(
            f"reward_timeout: reward function {name_of(func)} cannot run in a process of its own, which a limit takes; "
            "needs a function at the top of a module that can be imported"
        )
    return f"{module.__file__ if module.__name__.startswith(OF_A_FILE) else module.__name__}:{name}"


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of a function, or of an object's type."""
    return getattr(func, "__name__", type(func).__name__)


def call(func: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Return what ``func`` returns, awaited if it is a coroutine, tensors and arrays in it as numbers and lists."""
    result = func(**arguments)
    result = run_coroutine(result) if inspect.iscoroutine(result) else result
    return [plain(item) for item in result] if isinstance(result, (list, tuple)) else plain(result)


def plain(value: Any) -> Any:
    """Return a tensor or an array as a number or a list, a tuple as a list, and anything else as it is."""
    if isinstance(value, tuple):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else value


def run_coroutine(coroutine: Any) -> Any:
    """Run a coroutine to its end in a thread of its own, so that it may be asked for inside a running event loop."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((asyncio.run(coroutine), None))
        except BaseException as error:
            outcome.extend((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = outcome
    if error is not None:
        raise error
    return value


class Failure(Exception):
    """A reward function raised; the message is what it raised and where, in one line."""

    @classmethod
    def of(cls, func: Callable[..., Any], error: BaseException) -> Failure:
        """Describe ``error``, raised by ``func``, with the last line of the function's file that it went through."""
        frames = traceback.extract_tb(error.__traceback__)
        code = getattr(inspect.unwrap(func), "__code__", None)
        own = [f for f in frames if code is not None and f.filename == code.co_filename]
        where = "".join(f" ({f.filename}:{f.lineno})" for f in (own or frames)[-1:])
        return cls(f"raised {type(error).__name__}: {in_one_line(error)}{where}")


class TimedOut(Exception):
    """A reward function took longer than its limit, and its process has been ended."""


class RewardProcess:
    """One reward function in a process of its own, started when it is first called."""

    def __init__(self, reference: str):
        self.reference = reference
        self.connection: Connection | None = None

    def __call__(self, arguments: dict[str, Any], timeout: float, logs: Sequence[str] = ()) -> tuple[Any, Logged]:
        """Return what the function returns, and what it logs, given also those of the methods of Logged that ``logs``
        names. Raises Failure, and TimedOut after ``timeout`` seconds."""
        connection = self.connection or self._start()
        try:
            connection.send((arguments, list(logs)))
            if not connection.poll(timeout):
                self.stop()
                raise TimedOut
            failed, value = connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise Failure(f"ended its process (exit status {self._exit_status()})") from error
        if failed:
            message, details = value
            raise Failure(message) from RuntimeError(details)
        return value

    def _start(self) -> Connection:
        connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "asyppo.rewards.worker", str(theirs.fileno()), self.reference],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # Ctrl-C is for the trainer, which finishes its step
        )
        theirs.close()
        self._end = weakref.finalize(self, _end, self.process, connection)
        self.connection = connection  # from here on there is something to stop
        try:
            connection.recv()  # it has imported the function: the limit is for calls alone
        except EOFError as error:
            status = self._exit_status()
            raise Failure(f"could not be loaded in a process of its own (exit status {status})") from error
        return connection

    def _exit_status(self) -> int:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)  # it is on its way out
        self.stop()
        return self.process.returncode

    def stop(self) -> None:
        """End the process; the next call starts another."""
        if self.connection is not None:
            self._end()
            self.connection = None


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def _serve(connection: Connection, reference: str) -> None:
    parent = os.getppid()
    threading.Thread(target=_leave_without, args=[parent], daemon=True).start()
    func = load("reward_funcs", reference)
    connection.send("ready")
    while True:
        try:
            arguments, logs = connection.recv()
        except EOFError:
            return
        logged = Logged()
        answer: tuple[bool, tuple[Any, Any]]
        try:
            answer = (False, (call(func, arguments | {name: getattr(logged, name) for name in logs}), logged))
        except Exception as error:
            answer = (True, (str(Failure.of(func, error)), traceback.format_exc()))
        connection.send(answer)


def _leave_without(parent: int) -> None:
    """End this process when its parent is gone, even while a function is stuck."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2])
