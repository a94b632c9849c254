"""A policy head, that is log-prob and entropy from hidden states, takes part in both policy-head ops."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import torch

from bench.cases import Case
from bench.ops import linear_logprob, linear_ppo_loss
from bench.registry import Absent, Contender, Head, Run, add


def policy_head(
    name: str,
    *,
    entropy: bool = True,
    temperature: bool = True,
    compiled: bool = False,
    less: str = "",
    accumulates: tuple[str, ...] = (),
) -> Callable[[Callable[[Case], Head]], Callable[[Case], Head]]:
    """Register the decorated builder of a head; False for what it cannot do, which keeps it out of such cases.

    ``compiled``: under linear_ppo_loss the loss over the head is compiled with it, as a trainer would.
    """

    def register(build: Callable[[Case], Head]) -> Callable[[Case], Head]:
        for op in (linear_logprob, linear_ppo_loss):

            def build_run(case: Case, op=op) -> Run:
                wanted = case.options.get("entropy") or case.options.get("entropy_coef")
                if wanted and not entropy:
                    raise Absent("computes no entropy")
                if case.options["temperature"] != 1.0 and not temperature:
                    raise Absent("takes no temperature")
                head = build(case)
                return op.run_of_head(head, case, compiler(case) if compiled else _as_it_is)

            add(op.OP, Contender(name, build_run, less, accumulates))
        return build

    return register


def compiler(case: Case) -> Callable[[Callable], Callable]:
    """torch.compile for this case's shapes, or Absent where it lacks a C++ compiler."""
    if case.device.type == "cpu" and not any(shutil.which(tool) for tool in ("g++", "clang++", "c++")):
        raise Absent("torch.compile needs a C++ compiler")
    return lambda function: torch.compile(function, dynamic=False)


def wants_entropy(case: Case) -> bool:
    """Whether a head should compute it if it can: the policy-loss op reports it even where the loss does without."""
    return bool(case.options.get("entropy", True))


def _as_it_is(function: Callable) -> Callable:
    return function
