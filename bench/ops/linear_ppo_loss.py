"""The policy loss and its gradients, from hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import asyppo_kernels
from asyppo_kernels.linear_ppo_loss.reference import linear_ppo_loss_reference
from bench.cases import Case, Head, Inputs, Outputs, Run, Scale, Sweep, Work, sweep_sizes
from bench.ops.linear_logprob import our_head
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
)
from bench.registry import Contender, add

OP = "linear_ppo_loss"
GRAPH = False
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
ENTROPY_DROPPED = 0.2
LIVE_FRACTIONS = (0.25, 0.5, 0.75, 1.0)


def cases(scale: Scale, device: torch.device) -> list[Case]:
    """AsyPPO's loss with both masks, and the loss without an entropy bonus, where a dropped token has no gradient."""
    return [
        _case("entropy bonus", SIZES[scale], scale, device, entropy_coef=0.01),
        _case("no entropy bonus", SIZES[scale], scale, device),
    ]


def sweeps(scale: Scale, device: torch.device) -> list[Sweep]:
    """Over rows, vocabulary and width, and over the share of rows whose advantage the mask keeps."""
    base = SWEEP_BASE[scale]
    found = sweep_sizes(
        OP,
        base,
        SWEEP_SIZES[scale],
        lambda name, sizes: _case(name, sizes, scale, device, entropy_coef=0.01),
    )
    live = tuple((x, _case(f"live fraction {x}", base, scale, device, live=x)) for x in LIVE_FRACTIONS)
    return [*found, Sweep(OP, "live fraction", live)]


def _case(
    name: str,
    sizes: dict[str, int],
    scale: Scale,
    device: torch.device,
    *,
    entropy_coef: float = 0.0,
    live: float = 0.8,
) -> Case:
    options = {
        "entropy_coef": entropy_coef,
        "live": live,
        "backward": True,
        "temperature": 0.8 if entropy_coef else 1.0,  # some peers that know no entropy know no temperature either
        "logits": "peaked",
    }
    return Case(OP, name, sizes, options, DTYPE[scale], device)


def inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Every row counts. The ratio is clear of the clip's edges, or rounding would decide which rows are clipped."""
    made, logprob = head_inputs(case, generator)
    n, device = case.sizes["N"], case.device

    def uniform() -> Tensor:
        return torch.rand(n, device=device, generator=generator)

    near, far = uniform() * 0.2 - 0.1, (uniform() * 0.2 + 0.4) * (uniform() - 0.5).sign()
    made["old_logprob"] = logprob - torch.where(uniform() < 0.8, near, far)
    # A mean clear of zero, or the loss would be the small difference of large sums.
    made["advantage"] = torch.randn(n, device=device, generator=generator) + 0.5
    made["token_weight"] = torch.full((n,), 1 / n, device=device)
    made["advantage_keep"] = _mask(uniform(), float(case.options["live"]))
    made["entropy_keep"] = _mask(uniform(), 1 - ENTROPY_DROPPED)
    return made


def _mask(noise: Tensor, fraction: float) -> Tensor:
    """Exactly this share of True, anywhere."""
    keep = torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
    keep[noise.argsort()[: round(fraction * len(noise))]] = True
    return keep


def work(case: Case) -> Work:
    """Each row is in the forward's product; the two products of the gradients need only the rows that have one."""
    n = case.sizes["N"]
    live = n if case.options["entropy_coef"] else round(float(case.options["live"]) * n)
    if case.options["entropy_coef"]:  # a row leaves only if both masks drop it
        live = n - round((1 - float(case.options["live"])) * ENTROPY_DROPPED * n)
    flops = product_flops(case, n) + 2 * product_flops(case, live)
    return Work(flops, head_bytes(case, 5), f"1 matrix product of {n} rows, 2 of the {live} with a gradient")


def required(case: Case) -> set[str]:
    """Outputs a contender has to return."""
    return {"loss", "d_hidden", "d_weight"}


def options_of(case: Case) -> dict[str, float]:
    """The numbers of the loss, under the names the op gives them."""
    return {
        "temperature": float(case.options["temperature"]),
        "clip_low": CLIP_LOW,
        "clip_high": CLIP_HIGH,
        "entropy_coef": float(case.options["entropy_coef"]),
    }


def reference(case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """The definition in ``dtype``."""
    names = ("target", "old_logprob", "advantage", "token_weight")
    options = options_of(case)

    def forward(hidden: Tensor, weight: Tensor, part: Inputs) -> tuple[Tensor, Outputs, Outputs]:
        masks = {name: part[name] for name in ("advantage_keep", "entropy_keep")}
        result = linear_ppo_loss_reference(hidden, weight, *(part[name] for name in names), **masks, **options)
        return result.loss, {"loss": result.loss}, {"logprob": result.logprob, "entropy": result.entropy}

    return by_rows(case, inputs, dtype, forward)


def policy_loss(logprob: Tensor, entropy: Tensor | None, inputs: Inputs, entropy_coef: float) -> Tensor:
    """Return the loss as a trainer writes it, over the log-probs and entropies of a head."""
    ratio = torch.exp(logprob - inputs["old_logprob"])
    advantage = inputs["advantage"]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)
    token_loss = -surrogate * inputs["advantage_keep"]
    if entropy_coef:
        assert entropy is not None
        token_loss = token_loss - entropy_coef * entropy * inputs["entropy_keep"]
    return (token_loss * inputs["token_weight"]).sum()


def run_of_head(head: Head, case: Case, wrap: Callable[[Callable], Callable]) -> Run:
    """Measure the loss over ``head``, wrapped (compiled, or as it is), and its backward."""
    entropy_coef = float(case.options["entropy_coef"])

    def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        logprob, entropy = head(inputs["hidden"], inputs["weight"], inputs["target"])
        return policy_loss(logprob, entropy, inputs, entropy_coef), logprob, entropy

    forward = wrap(forward)

    def run(inputs: Inputs) -> Outputs:
        loss, logprob, entropy = forward(inputs)
        outputs = {"loss": loss.detach(), "logprob": logprob.detach()}
        if entropy is not None:
            outputs["entropy"] = entropy.detach()
        return outputs | gradients(loss, inputs)

    return run


def gradients(loss: Tensor, inputs: Inputs) -> Outputs:
    """Gradients of hidden and weight."""
    d_hidden, d_weight = torch.autograd.grad(loss, (inputs["hidden"], inputs["weight"]))
    return {"d_hidden": d_hidden, "d_weight": d_weight}


def _ours(case: Case, backend: str) -> Run:
    options = options_of(case)

    def run(inputs: Inputs) -> Outputs:
        result = asyppo_kernels.linear_ppo_loss(**inputs, **options, backend=backend)
        outputs = {"loss": result.loss.detach(), "logprob": result.logprob, "entropy": result.entropy}
        return outputs | gradients(result.loss, inputs)

    return run


def _ours_composed(case: Case, backend: str) -> Run:
    """The loss as a trainer writes it, over our log-prob."""
    return run_of_head(our_head(case, backend), case, as_it_is)


add_ours(OP, _ours, cases, inputs, accumulates=("d_hidden", "d_weight"))
add_ours(OP, _ours_composed, cases, inputs, accumulates=("d_hidden",), suffix=" linear_logprob + loss")
add(OP, Contender("plain torch", built_on(plain_head, run_of_head)))
add(OP, Contender("torch.compile", built_on(plain_head, run_of_head, compiled=True)))
