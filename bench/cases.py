"""What is measured: a case is one op on inputs of stated sizes, with stated options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Scale = Literal["gpu", "cpu", "quick"]  # quick is for a look and for the tests: its times say nothing
Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
Run = Callable[[Inputs], Outputs]  # what is measured
Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]  # hidden, weight, target -> logprob, entropy


@dataclass(frozen=True)
class Case:
    """One op on inputs of these sizes. ``name`` is unique within the op."""

    op: str
    name: str
    sizes: Mapping[str, int]
    options: Mapping[str, float | bool | str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def key(self) -> str:
        """Name that identifies the case in a result file."""
        return f"{self.op}: {self.name}"

    @property
    def backward(self) -> bool:
        """Whether the gradients are part of the work."""
        return bool(self.options.get("backward", False))


@dataclass(frozen=True)
class Work:
    """The fewest operations, and the fewest bytes (each input read once, each output written once), of a case."""

    flops: float
    bytes: float
    note: str = ""


@dataclass(frozen=True)
class Sweep:
    """Cases that differ in one size or option only."""

    op: str
    axis: str
    cases: tuple[tuple[float, Case], ...]


def sweep_sizes(
    op: str, sizes: Mapping[str, int], axes: Mapping[str, Sequence[int]], make: Callable[[str, dict[str, int]], Case]
) -> list[Sweep]:
    """Vary one size at a time, the others as in ``sizes``; ``make`` gets a name and the sizes."""
    return [
        Sweep(op, axis, tuple((x, make(f"{axis} = {x}", {**sizes, axis: x})) for x in values))
        for axis, values in axes.items()
    ]


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as torch does, without the module: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def nbytes(*tensors: Tensor) -> int:
    """Bytes of these tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors)
