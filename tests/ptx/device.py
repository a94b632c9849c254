"""Pretend a GPU to Triton: it specialises and compiles every launch itself, and the emulator runs it on CPU tensors."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from tests.ptx.machine import Machine, Schedule
from tests.ptx.memory import GlobalMemory
from tests.ptx.program import Program, PTXError, contract, parse
from tests.ptx.traffic import Traffic

FORMATS = {
    "i1": "<?",
    "i8": "<b",
    "u8": "<B",
    "i16": "<h",
    "u16": "<H",
    "i32": "<i",
    "u32": "<I",
    "i64": "<q",
    "u64": "<Q",
    "fp32": "<f",
}


@dataclass(frozen=True)
class Launch:
    """A kernel that ran: ``kernel`` is Triton's, ``machine`` holds how often each instruction did."""

    kernel: Any
    machine: Machine
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the function, with its module."""
        return f"{self.kernel.src.fn.module}.{self.kernel.src.fn.__name__}"


@dataclass
class Session:
    """What runs the launches inside ``emulated``, and what came of them."""

    schedule: Schedule
    count: bool  # the traffic, too
    change: Callable[[Any, Program], Program]  # of (Triton's kernel, its program), before it runs
    launches: list[Launch] = field(default_factory=list)

    def issues(self) -> list[str]:
        """Races and reads of memory that nobody wrote."""
        return [
            f"{launch.machine.program.name}: {text} ({count} times)"
            for launch in self.launches
            for text, count in launch.machine.issues.values()
        ]


_session: Session | None = None


class _Driver:
    """As much of a driver as Triton asks of it."""

    utils = SimpleNamespace(
        get_device_properties=lambda capability: {
            "max_shared_mem": 232_448 if capability >= 90 else 166_912,
            "multiprocessor_count": 132,
        }
    )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.get_current_device(), 32)

    def get_current_device(self) -> int:
        """The capability, so that Triton keeps the kernels of each apart."""
        assert _session is not None, "a Triton kernel is launched outside of emulated()"
        return _session.schedule.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@functools.cache
def _parsed(ptx: str, fuse: bool) -> Program:
    program = parse(ptx)
    return contract(program) if fuse else program


def _execute(kernel: Any, x: int, y: int, z: int, stream: int, function: Any, packed: Any, *rest: Any) -> None:
    """In place of the launcher that Triton compiles for a GPU."""
    assert _session is not None
    arguments = rest[3:]  # after the metadata and two hooks
    program = _session.change(kernel, _parsed(kernel.asm["ptx"], _session.schedule.contract))
    kinds = list(kernel.src.signature.values())
    memory, values = GlobalMemory(), []
    for kind, value in zip(kinds, arguments, strict=True):
        if kind.startswith("*"):
            storage = value.untyped_storage()
            assert value.device.type == "cpu"
            assert storage.nbytes() == 0 or storage.data_ptr() % 64 == 0, "torch aligns its allocations to 64 bytes"
            memory.add(storage.data_ptr(), storage.nbytes())
        if kind != "constexpr":
            values.append((kind, value))
    raw = [
        struct.pack("<Q", memory.address(value.data_ptr()))
        if kind.startswith("*")
        else struct.pack(FORMATS[kind], value)
        for kind, value in values
    ]
    if kernel.metadata.global_scratch_size or getattr(kernel.metadata, "profile_scratch_size", 0):
        raise PTXError("a kernel with scratch memory")
    raw += [bytes(8)] * (len(program.parameters) - len(raw))  # pointers to scratch memory, of which there is none
    machine = Machine(
        program,
        (x, y, z),
        kernel.metadata.shared,
        raw,
        memory,
        _session.schedule,
        seed=len(_session.launches),
        traffic=Traffic() if _session.count else None,
    )
    _session.launches.append(Launch(kernel, machine, (x, y, z)))
    with np.errstate(all="ignore"):
        machine.run()


def install() -> None:
    """Let ``backend="triton"`` run CPU tensors in the emulator, in this process, from now on.

    Raises RuntimeError under TRITON_INTERPRET, where Triton compiles nothing. Fresh tensors are filled with NaN.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET is set: kernels compile in a process without it only")
    import asyppo_kernels._args as args

    driver.set_active(_Driver())
    CompiledKernel._init_handles = lambda self: None
    CompiledKernel.run = property(lambda self: functools.partial(_execute, self))
    args.INTERPRETED = True  # what CPU tensors are let through by
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def unchanged(kernel: Any, program: Program) -> Program:
    """A kernel as it was compiled."""
    return program


@contextlib.contextmanager
def emulated(
    schedule: Schedule | None = None,
    *,
    count: bool = False,
    change: Callable[[Any, Program], Program] = unchanged,
) -> Iterator[Session]:
    """Inside, launches of Triton kernels run in the emulator."""
    global _session
    before, _session = _session, Session(schedule or Schedule(), count, change)
    try:
        yield _session
    finally:
        _session = before
