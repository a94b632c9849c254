"""A case: one call of an op, forward and backward, run in the emulator and compared with the op's definition."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor

from tests.ptx.device import Session, emulated
from tests.ptx.machine import Schedule

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROUNDING = {BF16: 2**-8, F16: 2**-11}  # of other results: 2e-6, a few roundings of float32

Results = dict[str, Tensor]


class Call(Protocol):
    """Runs the op on the same inputs each time, and returns its outputs and the gradients ``d_...``.

    ``backend``: an op's, or ``"reference"`` for its definition; ``cast``: the dtype to compute in, of floats.
    """

    def __call__(self, backend: str, cast: torch.dtype | None = None) -> Results: ...


@dataclass(frozen=True)
class Case:
    """``call(**arguments)`` makes the inputs. ``settings`` replaces attributes of the package, by dotted name."""

    op: str
    name: str
    call: Callable[..., Call]
    arguments: Mapping[str, Any]
    settings: Mapping[str, int]
    quick: bool = True  # among those that `make test-slow` runs

    def run(self, schedule: Schedule, **options: Any) -> tuple[Results, Session]:
        """Results, launches and issues under ``schedule``; ``options`` are those of ``emulated``."""
        with self.set(), emulated(schedule, **options) as session:
            return self.call(**self.arguments)("triton"), session

    def expected(self) -> tuple[Results, Results]:
        """(of the definition in float64, of the op's torch form): the error of the second is allowed, and a little."""
        with self.set():
            call = self.call(**self.arguments)
            return call("reference", F64), call("torch")

    def set(self) -> ExitStack:
        """A context in which ``settings`` hold."""
        stack = ExitStack()
        for path, value in self.settings.items():
            module, name = path.rsplit(".", 1)
            stack.enter_context(mock.patch.object(importlib.import_module(f"asyppo_kernels.{module}"), name, value))
        return stack


def compare(got: Results, plain: Results, want: Results, noise: float = 0.0) -> tuple[list[str], float]:
    """(what is wrong with ``got``, its largest error as a share of what is allowed).

    Allowed against ``want`` is twice the error of ``plain``, the torch form, and a rounding of the largest number; of
    that number, too, eight times the ``noise`` of the approximate functions, as a result passes several.
    """
    found, worst = [], 0.0
    # Gradients go through logits, or sums, of the lowest precision among the results.
    coarse = max(ROUNDING.get(result.dtype, 2e-6) for result in got.values())
    for key, oracle in want.items():
        result = got[key]
        if result.shape != oracle.shape:
            found.append(f"{key}: shape {list(result.shape)}, not {list(oracle.shape)}")
        elif result.dtype == torch.bool:
            if not torch.equal(result, oracle.bool()):
                found.append(f"{key}: {int((result != oracle).sum())} elements differ")
        elif not torch.equal(result.isnan(), oracle.isnan()):
            found.append(f"{key}: NaN in {int((result.isnan() != oracle.isnan()).sum())} places where it should not be")
        elif result.numel():
            ours, theirs, exact = (x.double().nan_to_num(0, 1e30, -1e30) for x in (result, plain[key], oracle))
            scale = max(float(exact.abs().max()), 1e-30)
            rounding = coarse if key.startswith("d_") else ROUNDING.get(result.dtype, 2e-6)
            rounding += 8 * noise
            error, other = float((ours - exact).abs().max()), float((theirs - exact).abs().max())
            worst = max(worst, error / (2 * other + scale * rounding))
            if error > 2 * other + scale * rounding:
                found.append(f"{key}: error {error:.3g} at a scale of {scale:.3g}; the torch form's is {other:.3g}")
    return found, worst


class Inputs:
    """Random inputs, the same each time."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32."""
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """float32 in [0, 1)."""
        return torch.rand(*shape, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator)


def leaf(x: Tensor, cast: torch.dtype | None, offset: int = 0, *, grad: bool = True) -> Tensor:
    """A copy of ``x`` to differentiate by, its first element ``offset`` elements past an aligned address."""
    dtype = cast or x.dtype
    copy = torch.zeros(x.numel() + offset, dtype=dtype)[offset:].view(x.shape)
    return copy.copy_(x).requires_grad_(grad)


def differentiate(outputs: Sequence[Tensor], upstream: Sequence[Tensor], leaves: Mapping[str, Tensor]) -> Results:
    """``d_name`` of each leaf that wants one."""
    loss = sum((o * u).sum() for o, u in zip(outputs, upstream, strict=True))
    assert isinstance(loss, Tensor)
    loss.backward()
    return {f"d_{name}": x.grad for name, x in leaves.items() if x.grad is not None}
