"""Advantages and returns on the mean of the critics."""

from __future__ import annotations

import torch

from bench.cases import Case, Inputs, Scale, Sweep, Work, sweep_sizes

OP = "ensemble_gae"
GRAPH = True

SIZES: dict[Scale, dict[str, int]] = {
    "gpu": {"K": 2, "B": 512, "T": 8192},
    "cpu": {"K": 2, "B": 64, "T": 1024},
    "quick": {"K": 2, "B": 3, "T": 37},
}
SWEEP_SIZES: dict[Scale, dict[str, tuple[int, ...]]] = {
    "gpu": {"T": (2048, 8192, 32768), "B": (128, 512, 2048), "K": (1, 2, 4)},
    "cpu": {"T": (512, 1024, 2048), "B": (16, 64, 256), "K": (1, 2, 4)},
    "quick": {"T": (20, 40), "B": (3,), "K": (1,)},
}


def cases(scale: Scale, device: torch.device) -> list[Case]:
    """Our default of two lambdas, the one lambda that other libraries know, and tool calls amid the response."""
    return [
        _case("two lambdas", SIZES[scale], device, value_lam=1.0),
        _case("one lambda", SIZES[scale], device, value_lam=0.95),
        _case("masked steps between valid ones", SIZES[scale], device, value_lam=0.95, holes=True),
    ]


def sweeps(scale: Scale, device: torch.device) -> list[Sweep]:
    """Over steps, responses and critics."""
    return sweep_sizes(
        OP, SIZES[scale], SWEEP_SIZES[scale], lambda name, sizes: _case(name, sizes, device, value_lam=1.0)
    )


def _case(name: str, sizes: dict[str, int], device: torch.device, *, value_lam: float, holes: bool = False) -> Case:
    options = {"gamma": 1.0, "lam": 0.95, "value_lam": value_lam, "holes": holes}
    return Case(OP, name, sizes, options, torch.float32, device)


def inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Responses of half to all the steps, padded on the right; with ``holes``, a tenth of the steps inside masked."""
    k, b, t = (case.sizes[name] for name in "KBT")
    lengths = torch.randint(-(-t // 2), t + 1, (b,), device=case.device, generator=generator)
    mask = torch.arange(t, device=case.device) < lengths[:, None]
    if case.options["holes"]:
        mask &= torch.rand(b, t, device=case.device, generator=generator) > 0.1
    return {
        "value": torch.randn(k, b, t, device=case.device, generator=generator),
        "reward": torch.randn(b, t, device=case.device, generator=generator),
        "mask": mask,
    }


def work(case: Case) -> Work:
    """Values, rewards and mask are read once; advantage, returns, mean and std written once."""
    k, b, t = (case.sizes[name] for name in "KBT")
    return Work(10.0 * b * t, b * t * (4.0 * (k + 5) + 1), "each number read or written once")


def required(case: Case) -> set[str]:
    """Outputs a contender has to return."""
    return {"advantage", "returns", "mean", "std"}
