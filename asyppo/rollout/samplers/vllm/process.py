"""vLLM in a process of its own on the same machine.

A process, since vLLM changes what it runs in (torch's threads, signals, CUDA's memory), and its versions of torch and
transformers may be others than the trainer's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from asyppo.rollout.samplers.base import EngineError
from asyppo.rollout.samplers.vllm import worker

OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells its processes, which vLLM would take for itself."""


class EngineProcess:
    """vLLM in a child process, which ends with this one, however that ends. Calls go through a pipe."""

    def __init__(
        self,
        arguments: dict[str, Any],
        *,
        python: str | None = None,
        environment: dict[str, str] | None = None,
        start_timeout: float = 600,
        timeout: float = 1800,
    ):
        """``arguments``: of ``vllm.LLM``, but for the model; ``python``: the interpreter of the environment that has
        vLLM, None: this one; timeouts in seconds, of the start and of a call."""
        self.arguments, self.python, self.environment = arguments, python or sys.executable, environment or {}
        self.start_timeout, self.timeout = start_timeout, timeout
        self.connection: Connection | None = None

    def load(self, directory: Path) -> None:
        """Start on the model in ``directory``, or else take the weights that lie there. Raises EngineError."""
        if self.connection is None:
            self._start(directory)
        else:
            self.call("reload", directory=str(directory))

    def call(self, method: str, **values: Any) -> Any:
        """Return what the function ``method`` of ``worker`` returns. Raises EngineError."""
        self.send(method, **values)
        return self.receive(self.timeout, "vllm.timeout")

    def begin(self, prompts: list[list[int]], samplings: list[dict[str, Any]]) -> None:
        """Let it draw responses; ``finish`` waits for them."""
        self.send("generate", prompts=prompts, samplings=samplings)

    def finish(self) -> worker.Drawn:
        """Return what ``begin`` asked for. Raises EngineError."""
        return self.receive(self.timeout, "vllm.timeout")

    def sleep(self, level: int) -> None:
        """Give memory back."""
        self.call("sleep", level=level)

    def wake(self, tags: list[str]) -> None:
        """Take memory back."""
        self.call("wake", tags=tags)

    def send(self, method: str, **values: Any) -> None:
        """Send a call. Raises EngineError."""
        assert self.connection is not None
        try:
            self.connection.send((method, values))
        except OSError as error:
            raise self._died() from error

    def receive(self, timeout: float, setting: str) -> Any:
        """Return the answer to a call, which may take ``timeout`` seconds. Raises EngineError."""
        assert self.connection is not None
        try:
            if not self.connection.poll(timeout):
                name, said = self.name, self.last_output()
                self.process.kill()
                self.stop()
                raise EngineError(
                    f"{name} did not answer within {setting} = {timeout:g} s and was ended; its last output: {said}"
                )
            went_well, answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if not went_well:
            name, said = self.name, self.last_output()
            self.stop()
            ending = "" if said in answer else f"; its last output: {said}"
            raise EngineError(f"{name} failed: {answer}{ending}")
        return answer

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"vLLM (process {self.process.pid})"

    def last_output(self) -> str:
        """Return the last line that it has printed."""
        size = os.fstat(self.output.fileno()).st_size
        end = os.pread(self.output.fileno(), 16_384, max(0, size - 16_384)).decode(errors="replace")
        return next((line.strip() for line in reversed(end.splitlines()) if line.strip()), "nothing")

    def _start(self, directory: Path) -> None:
        connection, theirs = Pipe()
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # without a name, nothing stays behind
        environment = {name: value for name, value in os.environ.items() if not _of_launchers(name)}
        try:
            self.process = subprocess.Popen(
                [self.python, "-P", worker.__file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=subprocess.STDOUT,
                env=environment | self.environment,
                start_new_session=True,  # Ctrl-C is for the trainer, which finishes its step
            )
        except OSError as error:
            raise EngineError(f"vllm.python: cannot run {self.python}: {error.strerror}") from error
        theirs.close()
        self._end = weakref.finalize(self, _end, self.process, connection)
        self.connection = connection
        with contextlib.suppress(OSError):  # where it is gone already, receive says so
            connection.send((self.arguments | {"model": str(directory)}, str(directory)))
        self.receive(self.start_timeout, "vllm.start_timeout")

    def _died(self) -> EngineError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)  # it is on its way out
        name, said = self.name, self.last_output()
        self.stop()
        status = self.process.returncode
        how = f"has ended with exit status {status}"
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
            how += ", as the system does when memory runs out" if status == -signal.SIGKILL else ""
        return EngineError(f"{name} {how}; its last output: {said}")

    def stop(self) -> None:
        """End the process; the next ``load`` starts another."""
        if self.connection is not None:
            self._end()
            self.connection = None


def _of_launchers(name: str) -> bool:
    return name in OF_LAUNCHERS or name.startswith("TORCHELASTIC_")


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()  # which lets it end in order
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
