"""``linear_ppo_loss`` in float64, written from its formulas, and what tests of it share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asyppo_kernels import LinearPPOLoss, linear_ppo_loss
from tests.ops.policy_head import HEAD, ROUNDING, doubled, error, leaves, logit_roundings

FLOAT32 = 4e-6  # of the largest element: a float32 sum of a few hundred terms, and exp of a difference of log-probs


def make(
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    *,
    masks: bool = True,
    counted: float = 0.75,
    scale: float = 1.0,
) -> dict[str, Any]:
    """All tensors of the loss. Old and reference log-probs are near enough for ratios on both sides of the clip."""
    hidden = (torch.randn(n, h) * scale).to(dtype)
    weight = (torch.randn(v, h) / h**0.5).to(dtype)
    target = torch.randint(v, (n,))
    bias = torch.randn(v).to(dtype)
    logp = (hidden.double() @ weight.double().T + bias.double()).log_softmax(1).gather(1, target[:, None]).squeeze(1)
    old_logprob = (logp + 0.3 * torch.randn(n)).float()
    token_weight = torch.rand(n).where(torch.rand(n) < counted, 0.0)
    target[torch.rand(n) < (1 - counted) / 2] = -100
    data = {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "target": target,
        "old_logprob": old_logprob,
        "advantage": torch.randn(n).where(torch.rand(n) < 0.9, 0.0),
        "token_weight": token_weight,
        "bias": bias.requires_grad_(),
    }
    if masks:
        data |= {
            "advantage_keep": torch.rand(n) < 0.7,
            "entropy_keep": torch.rand(n) < 0.7,
            "ref_logprob": (logp + 0.5 * torch.randn(n)).float(),
            "rollout_weight": torch.rand(n).where(torch.rand(n) < 0.9, 0.0),
        }
    return data


EVERYTHING = {
    "temperature": 0.8,
    "softcap": 6.0,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 1.5,
    "entropy_coef": 0.3,
    "kl_coef": 0.2,
    "kl_bias_correction": True,
}


def oracle(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    token_weight: Tensor,
    *,
    advantage_keep: Tensor | None = None,
    entropy_keep: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl_bias_correction: bool = False,
    dead_row_stats: bool = True,
) -> LinearPPOLoss:
    """Token by token in float64; rows that do not count are not looked at."""
    loss = 0.0 * hidden[:0].sum() + 0.0 * weight[:0].sum() + (0.0 if bias is None else 0.0 * bias[:0].sum())
    n = len(target)
    stats = torch.zeros(3, n, dtype=torch.float64)
    clipped = torch.zeros(n, dtype=torch.bool)
    for t in range(n):
        w = float(token_weight[t])
        if w == 0 or int(target[t]) == -100:
            continue
        keep_a = advantage_keep is None or bool(advantage_keep[t])
        keep_h = entropy_keep is None or bool(entropy_keep[t])
        a = float(advantage[t]) if keep_a else 0.0
        u = float(rollout_weight[t]) if keep_a and rollout_weight is not None else 1.0
        live = a * u != 0 or (entropy_coef != 0 and keep_h) or kl_coef != 0
        if not live and not dead_row_stats:
            continue

        z = weight @ hidden[t]
        if bias is not None:
            z = z + bias
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / temperature
        log_p = z - torch.logsumexp(z, 0)
        logp = log_p[int(target[t])]
        h = -(log_p.exp() * log_p).sum()

        def surrogate(x: Tensor, a: float = a) -> tuple[Tensor, Tensor]:
            r = torch.exp(x if -20 <= x <= 20 else torch.full_like(x, 20.0).copysign(x.detach()))
            low, high = 1 - clip_low, 1 + clip_high
            clipped_r = r if low <= r <= high else torch.full_like(r, low if r < low else high)
            s = r * a if r * a <= clipped_r * a else clipped_r * a
            if dual_clip is not None and a < 0 and s < dual_clip * a:
                s = torch.full_like(s, dual_clip * a)
            return r, s

        old = logp.item() if old_logprob is None else float(old_logprob[t])
        r, s = surrogate(logp - old)
        if a != 0:
            x = (logp.detach() - old).requires_grad_()
            s_of_x = surrogate(x)[1]
            clipped[t] = not s_of_x.requires_grad or torch.autograd.grad(s_of_x, x)[0] == 0
        stats[:, t] = torch.stack([logp, h, r]).detach()

        token = -u * s if keep_a else 0.0
        if keep_h:
            token = token - entropy_coef * h
        if kl_coef != 0:
            d = float(ref_logprob[t]) - logp
            d = d if -20 <= d <= 20 else torch.full_like(d, 20.0).copysign(d.detach())
            k3 = torch.exp(d) - d - 1
            token = token + kl_coef * (r * k3 if kl_bias_correction else k3)
        loss = loss + w * token
    return LinearPPOLoss(loss, *stats, clipped)


def rounded_logit_gradients(data: dict[str, Any], upstream: float, **options: Any) -> dict[str, Tensor]:
    """See ``logit_roundings``."""
    hidden, weight, token_weight = (data[name].detach() for name in ("hidden", "weight", "token_weight"))
    bias = weight.new_zeros(len(weight)) if data.get("bias") is None else data["bias"].detach()
    data = {**data, "hidden": hidden, "weight": weight, "bias": bias.requires_grad_()}
    rows = []
    for row in range(len(hidden)):
        data["token_weight"] = torch.where(torch.arange(len(hidden)) == row, token_weight, 0.0)
        # The bias is added to the logits: its gradient is theirs.
        rows += torch.autograd.grad(upstream * oracle(**data, **options).loss, bias)
    return logit_roundings(rows, hidden, weight)


def results(out: LinearPPOLoss, data: dict[str, Any], upstream: float = 1.0) -> list[Tensor]:
    """Loss, statistics and gradients, one after the other."""
    if not out.loss.requires_grad:
        return [*out]
    grads = torch.autograd.grad(
        out.loss, leaves(data), torch.tensor(upstream, dtype=out.loss.dtype), retain_graph=True, allow_unused=True
    )
    return [*out, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves(data), strict=True))]


def check(
    data: dict[str, Any],
    backend: str,
    *,
    tolerance: float = FLOAT32,
    floor: float = 1e-30,
    upstream: float = 1.0,
    **options: Any,
) -> LinearPPOLoss:
    """Loss, statistics and gradients are as near the oracle as float32, and a rounding to the input's dtype, allow."""
    out = linear_ppo_loss(**data, **options, backend=backend)
    compute_dtype = options.get("compute_dtype")
    exact_data = doubled(data, compute_dtype)
    wanted = {k: v for k, v in options.items() if k not in ("compact", "workspace_bytes", "compute_dtype")}
    want = oracle(**exact_data, **wanted)
    assert out.loss.shape == ()
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in out[1:])
    assert [x.dtype for x in out] == [torch.float32] * 4 + [torch.bool]
    assert torch.equal(out.clipped, want.clipped)
    got_all, exact_all = results(out, data, upstream), results(want, exact_data, upstream)
    # The loss is a sum in which signs cancel: its error is measured against the sum of magnitudes.
    magnitude = (exact_data["token_weight"].abs().sum() * (1 + want.loss.detach().abs())).item()
    assert abs(out.loss.item() - want.loss.item()) <= tolerance * max(magnitude, 1.0)
    for got, exact in zip(got_all[1:4], exact_all[1:4], strict=True):
        assert error(got, exact, floor) <= tolerance
    more: dict[str, Tensor] = {}
    if backend == "triton" and (compute_dtype or data["weight"].dtype) == torch.bfloat16 and len(data["target"]):
        more = rounded_logit_gradients(exact_data, upstream, **wanted)
    names = [name for name in HEAD if data.get(name) is not None and data[name].requires_grad]
    for name, got, exact in zip(names, got_all[5:], exact_all[5:], strict=True):
        assert got.dtype == data[name].dtype
        allowed = (4 * tolerance + ROUNDING[got.dtype]) * exact.abs().max().clamp(min=floor) if exact.numel() else 0.0
        assert ((got.double() - exact).abs() <= allowed + more.get(name, 0.0)).all()
    return out
