"""Which tokens the critics' disagreement admits: two order statistics, and two masks."""

from __future__ import annotations

import torch

from bench.cases import Case, Inputs, Scale, Sweep, Work, sweep_sizes

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
