"""Whether a sampler draws from what the trainer learns: its log-probs beside those of the policy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.config.references import in_one_line
from asyppo.data.batch import make_batch, micro_batches
from asyppo.distributed.processes import forked_rng, is_main
from asyppo.models.policy import Policy
from asyppo.rollout.samplers.base import Response, Sampler

log = logging.getLogger("asyppo")

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Nats that the log-probs of the same tokens may differ by in the mean, by the dtype of the policy's passes, where its
rounding is not known."""

ROUNDINGS, LEAST = 6.0, 1e-3
"""A sampler of a policy that computes in bfloat16 may be off by so many times the policy's own rounding, or by the nats
beside it. Seen on tiny models: 0.1 to 2.8 times where the sampler is right (seven families), 5.5 to 212 where it is not
(three); docs/running.md."""

AGREES = TOLERANCE[torch.float32]
"""Nats up to which the sampler's log-probs may stand for the trainer's."""


class Agreement(NamedTuple):
    """How far log-probs of the same tokens are apart, in nats: the mean over the tokens of a response, of the response
    where it is largest."""

    gap: float
    """Of the sampler's and the policy's."""
    rounding: float | None
    """Of the policy's and those that it computes in float32; None where it computes in that anyway, or cannot, having
    frozen weights in bfloat16 or being sharded."""


def tolerance(config: AsyPPOConfig, policy: Policy, rounding: float | None = None) -> float:
    """Return the difference that ``config`` allows, or else what the policy's ``rounding`` does, or its dtype."""
    if config.sampling_logp_tolerance is not None:
        return config.sampling_logp_tolerance
    return TOLERANCE[policy.dtype] if rounding is None else max(LEAST, ROUNDINGS * rounding)


class Alternatives:
    """``Sampler`` that samples in one of several ways: the first, until ``settle`` has tried them."""

    def __init__(self, ways: Mapping[str, Callable[[], Sampler]]):
        """``ways``: what makes a sampler, by what a message calls it."""
        self.ways = ways
        self.chosen = next(iter(ways.values()))()

    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """Return one response for each prompt (int64 [length])."""
        return self.chosen.sample(prompts, max_completion_length=max_completion_length, temperature=temperature)


def settle(sampler: Sampler, engine: object, policy: Policy, prompts: Sequence[Tensor], config: AsyPPOConfig) -> float:
    """Make sure that ``sampler``, which calls ``engine``, samples from the ``policy``: by short responses to some of
    the ``prompts`` (int64 [length]) and to parts of them. Returns by how many nats their log-probs differ.

    Where ``engine`` has ``Alternatives``, the first way that can and agrees is taken, and a line logged that says why
    the ones before it are not. Raises ConfigError, which says so in a line, where none does.
    """
    if not isinstance(engine, Alternatives):
        if objection := _beyond(found := agreement(sampler, policy, prompts, config), config, policy):
            raise ConfigError(
                f"sampler: {objection}; needs a sampler of the policy's distribution, or a sampling_logp_tolerance"
            )
        return found.gap
    objections: dict[str, str] = {}
    for name, make in engine.ways.items():
        if objections:
            del engine.chosen  # with it goes its copy of the weights
            engine.chosen = make()
        with _quiet():
            try:
                objection = _beyond(found := agreement(sampler, policy, prompts, config), config, policy)
            except Exception as error:  # whatever transformers meets in a model that it cannot sample from
                objection = f"{type(error).__name__}: {in_one_line(error)}"
        if objection is None:
            if objections and is_main():
                log.warning("sampler: %s is used; %s", name, _listed(objections))
            return found.gap
        objections[name] = objection
    model = type(policy.model).__name__
    raise ConfigError(
        f"sampler: got {config.sampler!r}, which does not sample from {model}, needs "
        f"{'one of your own' if config.sampler == 'auto' else 'auto, or one of your own'}; {_listed(objections)}"
    )


@torch.no_grad()
def agreement(sampler: Sampler, policy: Policy, prompts: Sequence[Tensor], config: AsyPPOConfig) -> Agreement:
    """Return by how many nats the log-probs of sampled tokens and those that ``policy`` computes of them differ, and by
    how many its own do when they are not rounded.

    Two short responses each to the shortest and the longest of ``prompts`` (int64 [length]), and to the last half,
    quarter and token of the longest, all in one call. Torch's generators are put back afterwards.
    """
    by_length = sorted(prompts, key=len)
    longest = by_length[-1][-256:]
    trial = [by_length[0], *(longest[-max(1, len(longest) // part) :] for part in (1, 2, 4, len(longest)))]
    trial = [prompt for prompt in trial for _ in range(2)]
    with forked_rng():
        torch.manual_seed(config.seed)
        responses = sampler.sample(
            trial, max_completion_length=min(12, config.max_completion_length), temperature=policy.temperature
        )
    batch = make_batch(
        trial,
        [r.tokens for r in responses],
        [r.logprob for r in responses],
        [0.0] * len(trial),
        [r.truncated for r in responses],
        list(range(len(trial))),
        pad_token_id=0,
        device=policy.device,
    )
    everything = torch.arange(len(batch), device=policy.device)
    micros = list(micro_batches(batch, everything, config.max_tokens_per_micro_batch))

    def apart(one: Tensor, other: Tensor) -> float:
        gap = torch.where(batch.mask, (one - other).abs(), 0.0)
        return float((gap.sum(dim=1) / batch.mask.sum(dim=1)).max())

    logprob, rounding = policy.logprobs(batch, micros).logprob, None
    if policy.rounds:
        with policy.in_float32():
            rounding = apart(logprob, policy.logprobs(batch, micros).logprob)
    policy.padding_frac()  # counts the passes, and a step is to have its own alone
    return Agreement(apart(logprob, batch.sampler_logprob), rounding)


def _beyond(found: Agreement, config: AsyPPOConfig, policy: Policy) -> str | None:
    """Say that the gap is more than is allowed, or NaN; None where it is not."""
    limit = tolerance(config, policy, found.rounding)
    if found.gap <= limit:
        return None
    return f"log-probs differ from the trainer's by {found.gap:.3g} nats a token, more than {limit:.3g}"


def _listed(objections: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {objection}" for name, objection in objections.items())


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what is logged, tracebacks of transformers' threads among it, for the time inside."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
