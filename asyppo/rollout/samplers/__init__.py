"""Samplers: from prompts to responses. ``SAMPLERS`` has the built-in ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.config.references import check_parameters, resolve
from asyppo.models.policy import Policy
from asyppo.models.tokenizer import eos_token_ids, pad_token_id
from asyppo.rollout.samplers.base import DividedSampler, HoldsWeights, NamedWeights, Response, Sampler, SentWeights
from asyppo.rollout.samplers.continuous import ContinuousBatchingSampler
from asyppo.rollout.samplers.generate import GenerateSampler

__all__ = [
    "SAMPLERS",
    "ContinuousBatchingSampler",
    "DividedSampler",
    "GenerateSampler",
    "HoldsWeights",
    "NamedWeights",
    "Response",
    "Sampler",
    "SamplerFactory",
    "SentWeights",
    "make_sampler",
    "sampler_factory",
]


SamplerFactory = Callable[[Policy, PreTrainedTokenizerBase, AsyPPOConfig], Sampler]


def _decoding(kind: Any, policy: Policy, tokenizer: PreTrainedTokenizerBase, config: AsyPPOConfig) -> Sampler:
    return kind(
        policy.model,
        eos_token_ids=eos_token_ids(policy.model, tokenizer),
        pad_token_id=pad_token_id(tokenizer),
        batch_size=config.generation_batch_size,
        dtype=policy.dtype,
    )


def _auto(policy: Policy, tokenizer: PreTrainedTokenizerBase, config: AsyPPOConfig) -> Sampler:
    kind = ContinuousBatchingSampler if policy.device.type == "cuda" else GenerateSampler
    return _decoding(kind, policy, tokenizer, config)


SAMPLERS: dict[str, SamplerFactory] = {
    "auto": _auto,
    "generate": partial(_decoding, GenerateSampler),
    "continuous": partial(_decoding, ContinuousBatchingSampler),
}
"""The built-in ones by name. One's own is a function like these."""


def sampler_factory(config: AsyPPOConfig) -> SamplerFactory:
    """Return what makes the configured sampler. Raises ConfigError."""
    found = resolve("sampler", config.sampler, SAMPLERS)
    check_parameters("sampler", config.sampler, found, "policy", "tokenizer", "config")
    return found


def make_sampler(policy: Policy, tokenizer: PreTrainedTokenizerBase, config: AsyPPOConfig) -> Sampler:
    """Return the sampler that ``config`` asks for. Raises ConfigError."""
    sampler = sampler_factory(config)(policy, tokenizer, config)
    if not callable(getattr(sampler, "sample", None)):
        raise ConfigError(
            f"sampler: {config.sampler} returned {type(sampler).__name__}, needs an object with a method sample"
        )
    return sampler
