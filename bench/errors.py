"""How far outputs are from the oracle's, and how far they may be."""

from __future__ import annotations

import math

import torch

from bench.cases import Outputs

# What is allowed on top of the error of the same-precision plain-torch computation, relative to the oracle's norm.
# float32: logits near 30, computed again in the backward, differ by 2e-6 from those of the forward, and where the
# target is nearly certain its gradient, 1 - p, is a small difference. Low precision: one rounding of the result (half a
# unit in the last place is 2**-9 and 2**-12).
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||; of booleans, the share that differs. NaN and a wrong shape are infinitely far."""
    if got.shape != want.shape:
        return math.inf
    if want.dtype == torch.bool:
        return (got.bool() != want).double().mean().item() if want.numel() else 0.0
    got, want = got.detach().double(), want.double()
    scale = want.norm().item()
    distance = (got - want).norm().item()
    if not math.isfinite(distance):
        return math.inf
    return distance / scale if scale > 0 else distance


def limits(baseline: Outputs, oracle: Outputs, dtype: torch.dtype, slack: float = 1.0) -> dict[str, float]:
    """Return the largest error allowed for each output: ``slack`` times the baseline's, plus the tolerance.

    Of a mask one element may differ: a threshold interpolated between two neighbours can put one on the other side.
    """

    def tolerance(want: torch.Tensor) -> float:
        return 1 / max(1, want.numel()) if want.dtype == torch.bool else TOLERANCE[dtype]

    return {name: slack * error(baseline[name], want) + tolerance(want) for name, want in oracle.items()}


def verdict(got: Outputs, oracle: Outputs, limit: dict[str, float], required: set[str]) -> tuple[dict[str, float], str]:
    """Return the errors of all outputs known to the oracle, and a complaint, empty if there is nothing wrong."""
    errors = {name: error(got[name], want) for name, want in oracle.items() if name in got}
    missing = sorted(required - errors.keys())
    if missing:
        return errors, f"does not return {', '.join(missing)}"
    wrong = [f"{name}: error {e:.2g}, limit {limit[name]:.2g}" for name, e in errors.items() if not e <= limit[name]]
    return errors, "; ".join(wrong)
