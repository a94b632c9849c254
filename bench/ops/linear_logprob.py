"""Log-prob of the target and entropy, from hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import asyppo_kernels
from asyppo_kernels.linear_logprob.reference import linear_logprob_reference
from bench.cases import Case, Head, Inputs, Outputs, Run, Scale, Sweep, Work, sweep_sizes
from bench.ops.ours import add_ours
from bench.ops.policy_head import (
    DTYPE,
    SIZES,
    SWEEP_BASE,
    SWEEP_SIZES,
    as_it_is,
    built_on,
    by_rows,
    head_bytes,
    head_inputs,
    plain_head,
    product_flops,
    wants_entropy,
)
from bench.registry import Contender, add

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


def reference(case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """The definition in ``dtype``; its gradients are those of both outputs under the upstream gradients."""
    temperature, entropy = float(case.options["temperature"]), bool(case.options["entropy"])

    def forward(hidden: Tensor, weight: Tensor, part: Inputs) -> tuple[Tensor, Outputs, Outputs]:
        result = linear_logprob_reference(hidden, weight, part["target"], temperature=temperature, entropy=entropy)
        total = (result.logprob * part["grad_logprob"]).sum()
        if result.entropy is None:
            return total, {}, {"logprob": result.logprob}
        total = total + (result.entropy * part["grad_entropy"]).sum()
        return total, {}, {"logprob": result.logprob, "entropy": result.entropy}

    return by_rows(case, inputs, dtype, forward)


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


def our_head(case: Case, backend: str) -> Head:
    """Our op as a head."""

    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return asyppo_kernels.linear_logprob(
            hidden,
            weight,
            target,
            temperature=float(case.options["temperature"]),
            entropy=wants_entropy(case),
            backend=backend,
        )

    return head


def _ours(case: Case, backend: str) -> Run:
    return run_of_head(our_head(case, backend), case, as_it_is)


add_ours(OP, _ours, cases, inputs, accumulates=("d_hidden",))
add(OP, Contender("plain torch", built_on(plain_head, run_of_head)))
add(OP, Contender("torch.compile", built_on(plain_head, run_of_head, compiled=True)))
