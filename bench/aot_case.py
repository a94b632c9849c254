"""A kernel as a launch of it is specialised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A kernel as a launch of it is specialised, and what it may take.

    ``signature`` holds the arguments that are not constant, in any order: pointers such as ``"*fp32"`` (always found
    divisible by 16), ``"i32"``, ``"fp32"``. ``constants`` holds the constexprs, and None for pointers left out.
    ``divisible`` names the integers that a launch finds divisible by 16. ``wide`` says which of "load" and "store" have
    to be there with 16 bytes a lane. ``amd``: constants that are others there, where a warp has 64 lanes.
    Budgets: registers a thread (NVIDIA), bytes of shared memory a program. ``max_registers_with``: another one with a
    minor version of Triton, such as ``{"3.6": 184}``.
    """

    op: str
    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: Sequence[str] = ()
    num_warps: int = 4
    amd: Mapping[str, Any] = field(default_factory=dict)
    wide: Sequence[str] = ("load",)
    max_registers: int = 128
    max_registers_with: Mapping[str, int] = field(default_factory=dict)
    max_shared: int = 16384
