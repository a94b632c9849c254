"""A peer's policy head, that is log-prob and entropy from hidden states, takes part in both policy-head ops."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import Case, Head
from bench.ops import linear_logprob, linear_ppo_loss
from bench.ops.policy_head import built_on
from bench.registry import Contender, add


def policy_head(
    name: str,
    *,
    entropy: bool = True,
    temperature: bool = True,
    less: str = "",
    accumulates: tuple[str, ...] = (),
) -> Callable[[Callable[[Case], Head]], Callable[[Case], Head]]:
    """Register the decorated builder of a head; False for what it cannot do, which keeps it out of such cases."""

    def register(build: Callable[[Case], Head]) -> Callable[[Case], Head]:
        for op in (linear_logprob, linear_ppo_loss):
            run = built_on(build, op.run_of_head, entropy=entropy, temperature=temperature)
            add(op.OP, Contender(name, run, less, accumulates))
        return build

    return register
