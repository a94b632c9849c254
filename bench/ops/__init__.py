"""What the suite asks of each op, and the right answers.

An op's module holds its cases and inputs, its definition, our forms of it, and plain torch; importing it registers the
last two as contenders.
"""

from __future__ import annotations

from typing import Protocol

import torch

from bench.cases import Case, Inputs, Outputs, Scale, Sweep, Work
from bench.ops import (
    agreement_masks,
    critics,
    ensemble_gae,
    ensemble_value,
    linear_logprob,
    linear_ppo_loss,
    train_step,
    update,
)


class Op(Protocol):
    """What a module of an op has. ``SLACK``, ``phases``, ``TARGETS`` and ``TARGET_NOTE`` it may have."""

    OP: str
    GRAPH: bool
    """Whether its contenders are timed by replay of a CUDA graph."""

    def cases(self, scale: Scale, device: torch.device) -> list[Case]:
        """What is measured."""
        ...

    def sweeps(self, scale: Scale, device: torch.device) -> list[Sweep]:
        """Against what its growth is measured."""
        ...

    def inputs(self, case: Case, generator: torch.Generator) -> Inputs:
        """Random, and the same for the same generator."""
        ...

    def work(self, case: Case) -> Work:
        """The least that computes the outputs."""
        ...

    def required(self, case: Case) -> set[str]:
        """Outputs a contender has to return."""
        ...

    def reference(self, case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
        """The definition in plain torch, in this dtype."""
        ...


_ALL: tuple[Op, ...] = (
    update,
    linear_ppo_loss,
    linear_logprob,
    ensemble_value,
    ensemble_gae,
    agreement_masks,
    critics,
    train_step,
)
OPS: dict[str, Op] = {op.OP: op for op in _ALL}


def oracle(case: Case, inputs: Inputs) -> Outputs:
    """The right outputs: float64, from the inputs as the contenders get them."""
    return OPS[case.op].reference(case, inputs, torch.float64)


def baseline(case: Case, inputs: Inputs) -> Outputs:
    """The definition in the case's own dtype, by whose error others are judged."""
    return OPS[case.op].reference(case, inputs, case.dtype)
