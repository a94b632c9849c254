"""``linear_logprob`` in float64, written from its formulas, and what tests of it share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asyppo_kernels import LinearLogprob, linear_logprob
from tests.ops.policy_head import ROUNDING, doubled, error, leaves, logit_roundings

FLOAT32 = 2e-6  # of the largest element: a float32 sum of a few hundred terms


def make(
    n: int, h: int, v: int, dtype: torch.dtype = torch.float32, *, scale: float = 1.0, ignored: float = 0.25
) -> dict[str, Tensor]:
    """Head, hidden states and targets, some of them -100."""
    target = torch.randint(v, (n,))
    target[torch.rand(n) < ignored] = -100
    return {
        "hidden": (torch.randn(n, h) * scale).to(dtype).requires_grad_(),
        "weight": torch.randn(v, h).to(dtype).requires_grad_(),
        "target": target,
        "bias": torch.randn(v).to(dtype).requires_grad_(),
    }


def oracle(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Row by row in float64: log p_j = z_j - max z - log sum exp(z - max z), H = -sum p log p."""
    logprob, entropy = [], []
    for x, t in zip(hidden, target.tolist(), strict=True):
        if t == -100:
            logprob.append(torch.zeros((), dtype=torch.float64))
            entropy.append(torch.zeros((), dtype=torch.float64))
            continue
        z = torch.stack([x @ w for w in weight])
        if bias is not None:
            z = z + bias
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / temperature
        z = z - z.max().detach()
        log_p = z - z.exp().sum().log()
        logprob.append(log_p[t])
        entropy.append(-(log_p.exp() * log_p).sum())
    return torch.stack(logprob), torch.stack(entropy)


def gradients(outputs: tuple[Tensor | None, ...], upstream: tuple[Tensor | None, ...], inputs: list[Tensor]) -> list:
    """D (sum of output * upstream), skipping what has no upstream gradient."""
    total = sum((o * u.to(o.dtype)).sum() for o, u in zip(outputs, upstream, strict=True) if u is not None)
    return list(torch.autograd.grad(total, inputs, retain_graph=True))


def rounded_logit_gradients(data: dict[str, Any], upstream: tuple[Tensor, ...], **options: Any) -> dict[str, Tensor]:
    """See ``logit_roundings``."""
    data = {**data, "bias": torch.zeros(len(data["weight"])).double() if data["bias"] is None else data["bias"]}
    data["bias"] = data["bias"].detach().requires_grad_()
    rows = []
    for row in range(len(data["target"])):
        if data["target"][row] == -100:
            rows.append(torch.zeros_like(data["bias"]))
            continue
        one = {name: x[row : row + 1] if name in ("hidden", "target") else x for name, x in data.items()}
        # The bias is added to the logits: its gradient is theirs.
        rows += gradients(oracle(**one, **options), tuple(u[row : row + 1] for u in upstream), [data["bias"]])
    return logit_roundings(rows, data["hidden"].detach(), data["weight"].detach())


def check(
    data: dict[str, Any],
    backend: str,
    *,
    tolerance: float = FLOAT32,
    floor: float = 1e-30,
    compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> LinearLogprob:
    """Both outputs and all gradients are as near the oracle as float32, and a rounding to the input's dtype, allow."""
    out = linear_logprob(**data, **options, compute_dtype=compute_dtype, backend=backend)
    exact_data = doubled(data, compute_dtype)
    want = oracle(**exact_data, **options)
    for got, exact in zip(out, want, strict=True):
        assert got.dtype == torch.float32
        assert got.shape == exact.shape
        assert error(got, exact, floor) <= tolerance
    upstream = tuple(torch.randn(2, len(data["target"])).unbind())
    got_grads = gradients(out, upstream, leaves(data))
    if (data["target"] != -100).any():
        exact_grads = gradients(want, upstream, leaves(exact_data))
    else:
        exact_grads = [torch.zeros_like(x) for x in leaves(exact_data)]
    more: dict[str, Tensor] = {}
    if backend == "triton" and (compute_dtype or data["weight"].dtype) == torch.bfloat16:
        more = rounded_logit_gradients(exact_data, upstream, **options)
    names = [name for name, x in data.items() if x is not None and x.requires_grad]
    for name, got, exact in zip(names, got_grads, exact_grads, strict=True):
        assert got.dtype == data[name].dtype
        allowed = (4 * tolerance + ROUNDING[got.dtype]) * exact.abs().max().clamp(min=floor) if exact.numel() else 0.0
        assert ((got.double() - exact).abs() <= allowed + more.get(name, 0.0)).all()
    return out
