"""Which tokens the critics' disagreement admits: two order statistics, and two masks."""

from __future__ import annotations

import torch
from torch import Tensor

import asyppo_kernels
from asyppo_kernels.agreement_masks.reference import agreement_masks_reference
from bench.cases import Case, Inputs, Outputs, Run, Scale, Sweep, Work, sweep_sizes
from bench.ops.ours import add_ours
from bench.registry import compiler, contender

OP = "agreement_masks"
GRAPH = True

TOKENS: dict[Scale, dict[str, int]] = {
    # torch.quantile takes at most 2**24 numbers.
    "gpu": {"one batch": 512 * 8192, "more than 2^24": 2**25},
    "cpu": {"one batch": 64 * 8192},
    "quick": {"one batch": 1000},
}
SWEEP_TOKENS: dict[Scale, tuple[int, ...]] = {
    "gpu": (2**18, 2**20, 2**22, 2**24),
    "cpu": (2**15, 2**17, 2**19),
    "quick": (500, 1000),
}
FRACTION = 0.2


def cases(scale: Scale, device: torch.device) -> list[Case]:
    """A batch, and on a GPU one beyond torch.quantile."""
    return [Case(OP, name, {"N": n}, {}, torch.float32, device) for name, n in TOKENS[scale].items()]


def sweeps(scale: Scale, device: torch.device) -> list[Sweep]:
    """Over tokens."""
    return sweep_sizes(
        OP, {}, {"N": SWEEP_TOKENS[scale]}, lambda name, sizes: Case(OP, name, sizes, {}, torch.float32, device)
    )


def inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Standard deviations of two values, three quarters of them of tokens that count."""
    n = case.sizes["N"]
    std = torch.randn(n, device=case.device, generator=generator).abs_()
    return {"std": std, "mask": torch.rand(n, device=case.device, generator=generator) < 0.75}


def work(case: Case) -> Work:
    """A number and a bool read, two bools written; a selection needs more than one pass, which this does not count."""
    return Work(4.0 * case.sizes["N"], 7.0 * case.sizes["N"], "one pass; a selection needs more")


def required(case: Case) -> set[str]:
    """Outputs a contender has to return."""
    return {"advantage_keep", "entropy_keep"}


def reference(case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """The definition in ``dtype``, with its default fractions."""
    advantage_keep, entropy_keep, _, _ = agreement_masks_reference(inputs["std"].to(dtype), inputs["mask"])
    return {"advantage_keep": advantage_keep, "entropy_keep": entropy_keep}


def _ours(case: Case, backend: str) -> Run:
    fractions = {"advantage_fraction": FRACTION, "entropy_fraction": FRACTION}

    def run(inputs: Inputs) -> Outputs:
        result = asyppo_kernels.agreement_masks(**inputs, **fractions, backend=backend)
        return {"advantage_keep": result.advantage_keep, "entropy_keep": result.entropy_keep}

    return run


add_ours(OP, _ours, cases, inputs)


def _thresholds_to_masks(inputs: Inputs, low: Tensor, high: Tensor) -> Outputs:
    std, mask = inputs["std"], inputs["mask"]
    return {"advantage_keep": mask & (std >= low), "entropy_keep": mask & (std <= high)}


def ranks_by_sort(std: Tensor, mask: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The order statistics that leave a share ``low`` of the tokens that count below, and ``high`` above."""
    ordered = std[mask].sort().values
    n = len(ordered)
    below, above = (round(fraction * 1e6) * n // 10**6 for fraction in (low, high))
    return ordered[below], ordered[n - 1 - above]


@contender(OP, "sort")
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


@contender(OP, "sort, no host sync")
def masks_by_padded_sort(case: Case) -> Run:
    """Sort all, the masked tokens last."""
    return _masks_by_padded_sort


@contender(OP, "torch.compile of sort")
def masks_by_compiled_sort(case: Case) -> Run:
    """The same, compiled."""
    return compiler(case)(_masks_by_padded_sort)


@contender(OP, "torch.quantile", less="thresholds interpolated; at most 2^24 tokens")
def masks_by_quantile(case: Case) -> Run:
    """What most would write first."""

    def run(inputs: Inputs) -> Outputs:
        std = inputs["std"]
        low, high = torch.quantile(std[inputs["mask"]], std.new_tensor([FRACTION, 1 - FRACTION]))
        return _thresholds_to_masks(inputs, low, high)

    return run


@contender(OP, "torch.kthvalue")
def masks_by_kthvalue(case: Case) -> Run:
    """Two selections."""

    def run(inputs: Inputs) -> Outputs:
        valid = inputs["std"][inputs["mask"]]
        n = len(valid)
        rank = round(FRACTION * 1e6) * n // 10**6
        return _thresholds_to_masks(inputs, valid.kthvalue(rank + 1).values, valid.kthvalue(n - rank).values)

    return run
