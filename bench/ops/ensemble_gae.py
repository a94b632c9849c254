"""Advantages and returns on the mean of the critics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import asyppo_kernels
from asyppo_kernels.ensemble_gae.reference import ensemble_gae_reference
from bench.cases import Case, Inputs, Outputs, Run, Scale, Sweep, Work, sweep_sizes
from bench.ops.ours import add_ours
from bench.registry import Absent, compiler, contender

OP = "ensemble_gae"
GRAPH = True
UNROLLED_STEPS = 256  # of a loop over time, more make torch.compile take minutes

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


def _numbers(case: Case) -> dict[str, float]:
    return {name: float(case.options[name]) for name in ("gamma", "lam", "value_lam")}


def reference(case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """The definition in ``dtype``."""
    value, reward = inputs["value"].to(dtype), inputs["reward"].to(dtype)
    result = ensemble_gae_reference(value, reward, inputs["mask"], **_numbers(case))
    return dict(zip(("advantage", "returns", "mean", "std"), result, strict=True))


def _ours(case: Case, backend: str) -> Run:
    numbers = _numbers(case)
    return lambda inputs: asyppo_kernels.ensemble_gae(**inputs, **numbers, backend=backend)._asdict()


add_ours(OP, _ours, cases, inputs)


def gae_by_loop(inputs: Inputs, gamma: float, lam: float, value_lam: float) -> Outputs:
    """One step after the other, both lambdas in one loop."""
    value, reward, mask = inputs["value"], inputs["reward"], inputs["mask"]
    mean, std = value.mean(0), value.std(0, correction=0)
    next_value = next_advantage = next_residual = torch.zeros_like(mean[:, 0])
    advantages, residuals = [], []
    for t in reversed(range(mean.shape[1])):
        valid = mask[:, t]
        delta = reward[:, t] + gamma * next_value - mean[:, t]
        next_advantage = torch.where(valid, delta + gamma * lam * next_advantage, next_advantage)
        advantages.append(next_advantage)
        if value_lam != lam:
            next_residual = torch.where(valid, delta + gamma * value_lam * next_residual, next_residual)
            residuals.append(next_residual)
        next_value = torch.where(valid, mean[:, t], next_value)
    advantage = torch.stack(advantages[::-1], 1)
    residual = torch.stack(residuals[::-1], 1) if residuals else advantage
    outputs = {"advantage": advantage, "returns": residual + mean, "mean": mean, "std": std}
    return {name: x * mask for name, x in outputs.items()}


@contender(OP, "plain torch loop")
def gae_loop(case: Case) -> Run:
    """A Python loop over time, as trainers have it."""
    return lambda inputs: gae_by_loop(inputs, **_numbers(case))


@contender(OP, "torch.compile of the loop")
def compiled_gae_loop(case: Case) -> Run:
    """The same, unrolled by the compiler."""
    if case.sizes["T"] > UNROLLED_STEPS:
        raise Absent(f"unrolls all {case.sizes['T']} steps, and would compile for minutes")
    compiled = compiler(case)(gae_by_loop)
    return lambda inputs: compiled(inputs, **_numbers(case))


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """z_t = b_t + a_t z_{t+1}, by torch's own associative scan."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(later: tuple[Tensor, Tensor], sooner: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return later[0] * sooner[0], sooner[1] + sooner[0] * later[1]

    return associative_scan(combine, (a, b), dim=1, reverse=True, combine_mode="pointwise" if a.is_cuda else "generic")[
        1
    ]


def _gae_scan(inputs: Inputs, gamma: float, lam: float, value_lam: float) -> Outputs:
    mask = inputs["mask"]
    value, reward = inputs["value"] * mask, inputs["reward"] * mask
    mean, std = value.mean(0), value.std(0, correction=0)
    one = torch.ones_like(mean)
    # The next valid step's value, carried across masked ones; then the two discounted sums.
    carried = _scan(torch.where(mask, 0.0, one), mean)
    following = F.pad(carried[:, 1:], (0, 1))
    delta = (reward + gamma * following - mean) * mask
    advantage = _scan(torch.where(mask, gamma * lam, one), delta) * mask
    residual = advantage if value_lam == lam else _scan(torch.where(mask, gamma * value_lam, one), delta) * mask
    return {"advantage": advantage, "returns": (residual + mean) * mask, "mean": mean, "std": std}


@contender(OP, "torch.compile of associative_scan")
def compiled_gae_scan(case: Case) -> Run:
    """torch's prototype scan, compiled."""
    compiled = compiler(case)(_gae_scan)
    return lambda inputs: compiled(inputs, **_numbers(case))
