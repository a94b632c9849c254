"""Who takes part. A contender is built for a case, and says why where it cannot take part."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol, runtime_checkable

import torch

from bench.cases import Case, Run
from bench.environment import ROOT

# Packages whose pinned dependencies contradict ours: `pip install --no-deps --target .cache/peers verl`.
PEERS = ROOT / ".cache" / "peers"
if str(PEERS) not in sys.path:
    sys.path.append(str(PEERS))  # last: what is installed properly comes first


class Absent(Exception):
    """The contender cannot take part here; the message says why."""


@runtime_checkable
class Phased(Protocol):
    """A function that is measured, and knows what its time is made of."""

    phases: list[dict[str, float]]
    """Seconds of each phase, of each call so far."""

    def resident_bytes(self) -> int:
        """Bytes it holds between calls, beside the inputs."""
        ...


@dataclass(frozen=True)
class Contender:
    """``build`` makes the function that is measured, or raises Absent."""

    name: str
    build: Callable[[Case], Run]
    less: str = ""  # what it leaves out of the work the others do
    accumulates: tuple[str, ...] = ()  # outputs it accumulates in float32 beside the output itself
    required: frozenset[str] | None = None  # outputs it has to return; None: those the op asks of all

    @property
    def ours(self) -> bool:
        """Whether it is this project's own op."""
        return self.name.startswith("asyppo")


_CONTENDERS: dict[str, list[Contender]] = {}


def add(op: str, contender: Contender) -> None:
    """Let ``contender`` take part in ``op``."""
    entries = _CONTENDERS.setdefault(op, [])
    if any(other.name == contender.name for other in entries):
        raise ValueError(f"{op} already has a contender named {contender.name!r}")
    entries.append(contender)


def contender(
    op: str, name: str, *, less: str = "", accumulates: tuple[str, ...] = ()
) -> Callable[[Callable[[Case], Run]], Callable[[Case], Run]]:
    """Register the decorated builder as a contender of ``op``."""

    def register(build: Callable[[Case], Run]) -> Callable[[Case], Run]:
        add(op, Contender(name, build, less, accumulates))
        return build

    return register


def registered(op: str) -> list[Contender]:
    """Those of ``op`` whose modules have been imported, ours first, in the order of registration."""
    return sorted(_CONTENDERS.get(op, []), key=lambda entry: not entry.ours)


def need(module: str) -> ModuleType:
    """Import a peer, or raise Absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        missing = error.name or ""
        if missing.partition(".")[0] == top and missing in (top, ""):
            raise Absent(f"{top} is not installed") from error
        raise Absent(f"cannot import {module}: {error}") from error


def need_gpu(case: Case) -> None:
    """Raise Absent unless the case runs on a GPU."""
    if case.device.type != "cuda":
        raise Absent("needs a GPU")


def compiler(case: Case) -> Callable[[Callable], Callable]:
    """torch.compile for this case's shapes, or Absent where it lacks a C++ compiler."""
    if case.device.type == "cpu" and not any(shutil.which(tool) for tool in ("g++", "clang++", "c++")):
        raise Absent("torch.compile needs a C++ compiler")
    return lambda function: torch.compile(function, dynamic=False)
