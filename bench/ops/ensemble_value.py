"""The critics' value heads, with mean and standard deviation over the critics."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import asyppo_kernels
from asyppo_kernels.ensemble_value.reference import ensemble_value_reference
from bench.cases import Case, Inputs, Outputs, Run, Scale, Sweep, Work, sweep_sizes
from bench.ops.ours import add_ours
from bench.registry import compiler, contender

ARGUMENTS = ("hidden", "weight", "bias")

OP = "ensemble_value"
GRAPH = True

SIZES: dict[Scale, dict[str, int]] = {
    "gpu": {"K": 2, "N": 65536, "H": 1024},
    "cpu": {"K": 2, "N": 8192, "H": 512},
    "quick": {"K": 2, "N": 40, "H": 24},
}
SWEEP_SIZES: dict[Scale, dict[str, tuple[int, ...]]] = {
    "gpu": {"N": (16384, 65536, 262144), "K": (1, 2, 4), "H": (512, 1024, 2048)},
    "cpu": {"N": (4096, 8192, 16384), "K": (1, 2, 4), "H": (256, 512, 1024)},
    "quick": {"N": (20, 40), "K": (1,), "H": (24,)},
}


def cases(scale: Scale, device: torch.device) -> list[Case]:
    """The value pass, and training."""
    return [
        _case("forward", SIZES[scale], scale, device, backward=False),
        _case("forward + backward", SIZES[scale], scale, device),
    ]


def sweeps(scale: Scale, device: torch.device) -> list[Sweep]:
    """Over tokens, critics and width."""
    return sweep_sizes(OP, SIZES[scale], SWEEP_SIZES[scale], lambda name, sizes: _case(name, sizes, scale, device))


def _case(name: str, sizes: dict[str, int], scale: Scale, device: torch.device, *, backward: bool = True) -> Case:
    dtype = torch.bfloat16 if scale == "gpu" else torch.float32
    return Case(OP, name, sizes, {"backward": backward}, dtype, device)


def inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Last hidden states, the heads, and an upstream gradient for the values."""
    k, n, h = (case.sizes[name] for name in "KNH")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=case.device, generator=generator)

    made = {
        "hidden": normal(k, n, h).to(case.dtype),
        "weight": normal(k, h).div_(h**0.5).to(case.dtype),
        "bias": normal(k).to(case.dtype),
        "grad_value": normal(k, n),
    }
    if case.backward:
        for name in ARGUMENTS:
            made[name].requires_grad_()
    return made


def work(case: Case) -> Work:
    """Every hidden state is read once, and its gradient written once."""
    k, n, h = (case.sizes[name] for name in "KNH")
    hidden = k * n * h * case.dtype.itemsize
    values = 4.0 * (k + 2) * n
    if not case.backward:
        return Work(2.0 * k * n * h, hidden + values, "hidden read once")
    return Work(6.0 * k * n * h, 2.0 * hidden + values + 4.0 * k * n, "hidden read once, its gradient written once")


def required(case: Case) -> set[str]:
    """Outputs a contender has to return."""
    return {"value", "mean", "std"} | ({"d_hidden", "d_weight", "d_bias"} if case.backward else set())


def outputs_of(case: Case, inputs: Inputs, value: Tensor, mean: Tensor, std: Tensor) -> Outputs:
    """Return the outputs under their names, with the gradients where the case has them."""
    outputs = {"value": value.detach(), "mean": mean, "std": std}
    if case.backward:
        arguments = [inputs[name] for name in ARGUMENTS]
        grads = torch.autograd.grad(value, arguments, inputs["grad_value"].to(value.dtype))
        outputs |= dict(zip(("d_hidden", "d_weight", "d_bias"), grads, strict=True))
    return outputs


def reference(case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """The definition in ``dtype``."""
    cast = inputs | {name: inputs[name].detach().to(dtype).requires_grad_(case.backward) for name in ARGUMENTS}
    return outputs_of(case, cast, *ensemble_value_reference(*(cast[name] for name in ARGUMENTS)))


def _ours(case: Case, backend: str) -> Run:
    def run(inputs: Inputs) -> Outputs:
        result = asyppo_kernels.ensemble_value(*(inputs[name] for name in ARGUMENTS), backend=backend)
        return outputs_of(case, inputs, *result)

    return run


add_ours(OP, _ours, cases, inputs)


def _values(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """One linear layer a critic, as trainers with one critic have it."""
    layers = zip(inputs["hidden"], inputs["weight"], inputs["bias"], strict=True)
    value = torch.stack([F.linear(h, w[None], b[None]).squeeze(-1) for h, w, b in layers]).float()
    scores = value.detach()
    return value, scores.mean(0), scores.std(0, correction=0)


@contender(OP, "plain torch")
def plain_value(case: Case) -> Run:
    """A linear layer a critic, stacked."""
    return lambda inputs: outputs_of(case, inputs, *_values(inputs))


@contender(OP, "torch.compile")
def compiled_value(case: Case) -> Run:
    """The same, compiled."""
    compiled = compiler(case)(_values)
    return lambda inputs: outputs_of(case, inputs, *compiled(inputs))
