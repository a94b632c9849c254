"""Log-prob of the target and entropy, from hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import Case, Inputs, Outputs, Scale, Sweep, Work, sweep_sizes
from bench.ops.policy_head import DTYPE, SIZES, SWEEP_BASE, SWEEP_SIZES, head_bytes, head_inputs, product_flops
from bench.registry import Head, Run

OP = "linear_logprob"
GRAPH = False


def cases(scale: Scale, device: torch.device) -> list[Case]:
    """Scoring, training with an entropy bonus, and the plain log-prob that more peers compute."""

    def case(name: str, **options: float | bool | str) -> Case:
        return Case(OP, name, SIZES[scale], options, DTYPE[scale], device)

    return [
        case("forward", entropy=True, backward=False, temperature=0.8, logits="peaked"),
        case("forward + backward", entropy=True, backward=True, temperature=0.8, logits="peaked"),
        case("no entropy, flat logits", entropy=False, backward=True, temperature=1.0, logits="flat"),
    ]


def sweeps(scale: Scale, device: torch.device) -> list[Sweep]:
    """Forward and backward over rows, vocabulary and width."""
    options = {"entropy": True, "backward": True, "temperature": 1.0, "logits": "peaked"}
    return sweep_sizes(
        OP,
        SWEEP_BASE[scale],
        SWEEP_SIZES[scale],
        lambda name, sizes: Case(OP, name, sizes, options, DTYPE[scale], device),
    )


def inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Hidden, weight, target and an upstream gradient for each output."""
    made, _ = head_inputs(case, generator)
    for name in ("grad_logprob", "grad_entropy"):
        made[name] = torch.randn(case.sizes["N"], device=case.device, generator=generator)
    return made


def work(case: Case) -> Work:
    """Count one product forward and two backward; whoever does not keep the logits needs a fourth to recompute them."""
    products = 3 if case.backward else 1
    note = "3 matrix products; without storing the logits, a fourth" if case.backward else "1 matrix product"
    return Work(products * product_flops(case, case.sizes["N"]), head_bytes(case, 2), note)


def required(case: Case) -> set[str]:
    """Outputs a contender has to return."""
    names = {"logprob"} | ({"entropy"} if case.options["entropy"] else set())
    return names | ({"d_hidden", "d_weight"} if case.backward else set())


def objective(case: Case, outputs: Outputs, inputs: Inputs) -> Tensor:
    """A scalar whose gradient sends the upstream gradients into both outputs."""
    total = (outputs["logprob"] * inputs["grad_logprob"]).sum()
    return total + (outputs["entropy"] * inputs["grad_entropy"]).sum() if case.options["entropy"] else total


def run_of_head(head: Head, case: Case, wrap: Callable[[Head], Head]) -> Run:
    """Measure ``head``, wrapped (compiled, or as it is), with its backward where the case has one."""
    head = wrap(head)

    def run(inputs: Inputs) -> Outputs:
        hidden, weight = inputs["hidden"], inputs["weight"]
        with torch.set_grad_enabled(case.backward):
            logprob, entropy = head(hidden, weight, inputs["target"])
        outputs = {"logprob": logprob.detach()}
        roots, upstream = [logprob], [inputs["grad_logprob"]]
        if entropy is not None and case.options["entropy"]:
            outputs["entropy"] = entropy.detach()
            roots.append(entropy)
            upstream.append(inputs["grad_entropy"])
        if case.backward:
            upstream = [g.to(root.dtype) for g, root in zip(upstream, roots, strict=True)]
            outputs["d_hidden"], outputs["d_weight"] = torch.autograd.grad(roots, (hidden, weight), upstream)
        return outputs

    return run
