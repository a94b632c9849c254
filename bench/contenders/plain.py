"""What one writes without a library of kernels: plain torch, and torch.compile of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case, Inputs, Outputs
from bench.contenders.heads import compiler, policy_head, wants_entropy
from bench.ops import ensemble_value
from bench.ops.agreement_masks import FRACTION
from bench.registry import Absent, Head, Run, contender

UNROLLED_STEPS = 256  # of a loop over time, more make torch.compile take minutes


def _plain_head(case: Case) -> Head:
    temperature, want_entropy = float(case.options["temperature"]), wants_entropy(case)

    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        logp = F.log_softmax(F.linear(hidden, weight).float() / temperature, dim=-1)
        logprob = logp.gather(1, target[:, None]).squeeze(1)
        return logprob, -(logp.exp() * logp).sum(-1) if want_entropy else None

    return head


@policy_head("plain torch")
def plain_head(case: Case) -> Head:
    """Whole logits, in float32."""
    return _plain_head(case)


@policy_head("torch.compile", compiled=True)
def compiled_head(case: Case) -> Head:
    """Whole logits, in one compiled graph."""
    return _plain_head(case)


def _values(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """One linear layer a critic, as trainers with one critic have it."""
    layers = zip(inputs["hidden"], inputs["weight"], inputs["bias"], strict=True)
    value = torch.stack([F.linear(h, w[None], b[None]).squeeze(-1) for h, w, b in layers]).float()
    scores = value.detach()
    return value, scores.mean(0), scores.std(0, correction=0)


@contender("ensemble_value", "plain torch")
def plain_value(case: Case) -> Run:
    """A linear layer a critic, stacked."""
    return lambda inputs: ensemble_value.outputs_of(case, inputs, *_values(inputs))


@contender("ensemble_value", "torch.compile")
def compiled_value(case: Case) -> Run:
    """The same, compiled."""
    compiled = compiler(case)(_values)
    return lambda inputs: ensemble_value.outputs_of(case, inputs, *compiled(inputs))


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


def _lambdas(case: Case) -> dict[str, float]:
    return {name: float(case.options[name]) for name in ("gamma", "lam", "value_lam")}


@contender("ensemble_gae", "plain torch loop")
def gae_loop(case: Case) -> Run:
    """A Python loop over time, as trainers have it."""
    return lambda inputs: gae_by_loop(inputs, **_lambdas(case))


@contender("ensemble_gae", "torch.compile of the loop")
def compiledgae_by_loop(case: Case) -> Run:
    """The same, unrolled by the compiler."""
    if case.sizes["T"] > UNROLLED_STEPS:
        raise Absent(f"unrolls all {case.sizes['T']} steps, and would compile for minutes")
    compiled = compiler(case)(gae_by_loop)
    return lambda inputs: compiled(inputs, **_lambdas(case))


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


@contender("ensemble_gae", "torch.compile of associative_scan")
def compiled_gae_scan(case: Case) -> Run:
    """torch's prototype scan, compiled."""
    compiled = compiler(case)(_gae_scan)
    return lambda inputs: compiled(inputs, **_lambdas(case))


def _thresholds_to_masks(inputs: Inputs, low: Tensor, high: Tensor) -> Outputs:
    std, mask = inputs["std"], inputs["mask"]
    return {"advantage_keep": mask & (std >= low), "entropy_keep": mask & (std <= high)}


def ranks_by_sort(std: Tensor, mask: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The order statistics that leave a share ``low`` of the tokens that count below, and ``high`` above."""
    ordered = std[mask].sort().values
    n = len(ordered)
    below, above = (round(fraction * 1e6) * n // 10**6 for fraction in (low, high))
    return ordered[below], ordered[n - 1 - above]


@contender("agreement_masks", "sort")
def masks_by_sort(case: Case) -> Run:
    """Sort the tokens that count: a host synchronisation, to know how many."""
    return lambda inputs: _thresholds_to_masks(
        inputs, *ranks_by_sort(inputs["std"], inputs["mask"], FRACTION, FRACTION)
    )


def _masks_by_padded_sort(inputs: Inputs) -> Outputs:
    std, mask = inputs["std"], inputs["mask"]
    ordered = torch.where(mask, std, torch.inf).sort().values
    n = mask.sum()
    rank = round(FRACTION * 1e6) * n // 10**6
    low, high = ordered.gather(0, torch.stack([rank, n - 1 - rank]))
    return _thresholds_to_masks(inputs, low, high)


@contender("agreement_masks", "sort, no host sync")
def masks_by_padded_sort(case: Case) -> Run:
    """Sort all, the masked tokens last."""
    return _masks_by_padded_sort


@contender("agreement_masks", "torch.compile of sort")
def masks_by_compiled_sort(case: Case) -> Run:
    """The same, compiled."""
    return compiler(case)(_masks_by_padded_sort)


@contender("agreement_masks", "torch.quantile", less="thresholds interpolated; at most 2^24 tokens")
def masks_by_quantile(case: Case) -> Run:
    """What most would write first."""

    def run(inputs: Inputs) -> Outputs:
        std = inputs["std"]
        low, high = torch.quantile(std[inputs["mask"]], std.new_tensor([FRACTION, 1 - FRACTION]))
        return _thresholds_to_masks(inputs, low, high)

    return run


@contender("agreement_masks", "torch.kthvalue")
def masks_by_kthvalue(case: Case) -> Run:
    """Two selections."""

    def run(inputs: Inputs) -> Outputs:
        valid = inputs["std"][inputs["mask"]]
        n = len(valid)
        rank = round(FRACTION * 1e6) * n // 10**6
        return _thresholds_to_masks(inputs, valid.kthvalue(rank + 1).values, valid.kthvalue(n - rank).values)

    return run
