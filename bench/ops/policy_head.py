"""What the two policy-head ops share: hidden states, a head, targets drawn from the policy, and their sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Case, Inputs, Scale

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
