"""What the two policy-head ops share: sizes, inputs, how a head becomes a contender, and a head in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case, Head, Inputs, Outputs, Run, Scale
from bench.registry import Absent, compiler

Wrap = Callable[[Callable], Callable]
RunOfHead = Callable[[Head, Case, Wrap], Run]
# hidden, weight and the inputs of some rows -> what to differentiate, sums over the rows, and outputs by row
Forward = Callable[[Tensor, Tensor, Inputs], tuple[Tensor, Outputs, Outputs]]

# Standard deviation of a row's logits: entropy about log V - 1/2, and about one nat, as after pretraining.
LOGIT_STD = {"flat": 1.0, "peaked": 6.0}
ROWS = 512  # of logits at once, where only inputs or the oracle are computed

SIZES: dict[Scale, dict[str, int]] = {
    "gpu": {"N": 8192, "V": 151936, "H": 4096},
    "cpu": {"N": 512, "V": 7919, "H": 256},
    "quick": {"N": 24, "V": 101, "H": 32},
}
# One size varies at a time, the others stay at the first line's.
SWEEP_BASE: dict[Scale, dict[str, int]] = {
    "gpu": {"N": 4096, "V": 65536, "H": 2048},
    "cpu": {"N": 256, "V": 4001, "H": 128},
    "quick": {"N": 16, "V": 67, "H": 16},
}
SWEEP_SIZES: dict[Scale, dict[str, tuple[int, ...]]] = {
    "gpu": {"N": (1024, 4096, 16384), "V": (16384, 65536, 151936), "H": (1024, 2048, 4096)},
    "cpu": {"N": (128, 256, 512), "V": (2003, 4001, 8009), "H": (64, 128, 256)},
    "quick": {"N": (8, 16), "V": (67,), "H": (16,)},
}
DTYPE: dict[Scale, torch.dtype] = {"gpu": torch.bfloat16, "cpu": torch.float32, "quick": torch.float32}


def head_inputs(case: Case, generator: torch.Generator) -> tuple[Inputs, Tensor]:
    """Return hidden, weight and target, and the target's log-prob [N] in float32."""
    n, v, h = (case.sizes[name] for name in "NVH")
    device, temperature = case.device, float(case.options["temperature"])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    std = LOGIT_STD[str(case.options["logits"])] * temperature / h**0.5
    hidden, weight = normal(n, h).to(case.dtype), normal(v, h).mul_(std).to(case.dtype)
    target = torch.empty(n, dtype=torch.int64, device=device)
    logprob = torch.empty(n, device=device)
    for rows in torch.arange(n, device=device).split(ROWS):
        logp = torch.log_softmax((hidden[rows] @ weight.T).float() / temperature, dim=1)
        noise = torch.rand(logp.shape, device=device, generator=generator).clamp_(1e-20, 1 - 1e-7)
        target[rows] = (logp - noise.log().neg_().log_()).argmax(1)  # Gumbel: a draw from the policy
        logprob[rows] = logp.gather(1, target[rows][:, None]).squeeze(1)
    if case.backward:
        hidden.requires_grad_()
        weight.requires_grad_()
    return {"hidden": hidden, "weight": weight, "target": target}, logprob


def product_flops(case: Case, rows: float) -> float:
    """Operations of one matrix product of ``rows`` rows with the head."""
    return 2.0 * rows * case.sizes["V"] * case.sizes["H"]


def head_bytes(case: Case, row_numbers: int) -> float:
    """Bytes of hidden and weight, of their gradients where there are any, and of so many float32 numbers a row."""
    n, v, h = (case.sizes[name] for name in "NVH")
    once = (n * h + v * h) * case.dtype.itemsize
    return once * (2 if case.backward else 1) + 4.0 * n * row_numbers + 8.0 * n


def wants_entropy(case: Case) -> bool:
    """Whether a head should compute it if it can: the policy-loss op reports it even where the loss does without."""
    return bool(case.options.get("entropy", True))


def built_on(
    build: Callable[[Case], Head],
    run_of_head: RunOfHead,
    *,
    entropy: bool = True,
    temperature: bool = True,
    compiled: bool = False,
) -> Callable[[Case], Run]:
    """The builder of a contender on the head that ``build`` makes; False for what the head cannot do.

    ``compiled``: what ``run_of_head`` computes over the head is compiled with it, as a trainer would.
    """

    def build_run(case: Case) -> Run:
        wanted = case.options.get("entropy") or case.options.get("entropy_coef")
        if wanted and not entropy:
            raise Absent("computes no entropy")
        if case.options["temperature"] != 1.0 and not temperature:
            raise Absent("takes no temperature")
        head = build(case)
        return run_of_head(head, case, compiler(case) if compiled else as_it_is)

    return build_run


def as_it_is(function: Callable) -> Callable:
    """Not compiled."""
    return function


def plain_head(case: Case) -> Head:
    """Whole logits, in float32."""
    temperature, want_entropy = float(case.options["temperature"]), wants_entropy(case)

    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        logp = F.log_softmax(F.linear(hidden, weight).float() / temperature, dim=-1)
        logprob = logp.gather(1, target[:, None]).squeeze(1)
        return logprob, -(logp.exp() * logp).sum(-1) if want_entropy else None

    return head


def by_rows(case: Case, inputs: Inputs, dtype: torch.dtype, forward: Forward) -> Outputs:
    """A definition's outputs and gradients in ``dtype``. Each row is independent of the others, and d_weight and the
    loss are sums over them: in float64, where whole logits would not fit, ``ROWS`` rows at once."""
    n = case.sizes["N"]
    step = ROWS if dtype == torch.float64 else n
    weight = inputs["weight"].detach().to(dtype).requires_grad_(case.backward)
    parts: list[Outputs] = []
    totals: Outputs = {}
    for start in range(0, n, step):
        part = {name: x.detach()[start : start + step] for name, x in inputs.items() if name != "weight"}
        if dtype == torch.float64:
            part = {name: x.double() if x.is_floating_point() else x for name, x in part.items()}
        hidden = part["hidden"].to(dtype).requires_grad_(case.backward)
        with torch.set_grad_enabled(case.backward):
            loss, sums, outputs = forward(hidden, weight, part)
        if case.backward:
            outputs["d_hidden"], sums["d_weight"] = torch.autograd.grad(loss, (hidden, weight))
        parts.append({name: x.detach() for name, x in outputs.items()})
        for name, x in sums.items():
            totals[name] = totals[name].add_(x.detach()) if name in totals else x.detach().clone()
    return totals | {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
