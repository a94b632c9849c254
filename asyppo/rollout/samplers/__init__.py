"""Samplers: from prompts to responses. ``SAMPLERS`` has the built-in ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.config.references import check_parameters, resolve
from asyppo.models.policy import Policy
from asyppo.models.tokenizer import eos_token_ids, pad_token_id
from asyppo.rollout.samplers.base import (
    DividedSampler,
    EngineError,
    HoldsWeights,
    NamedWeights,
    Response,
    Sampler,
    SamplesAhead,
    SentWeights,
    Sleeps,
)
from asyppo.rollout.samplers.check import AGREES, Alternatives, agreement, settle, tolerance
from asyppo.rollout.samplers.continuous import ContinuousBatchingSampler
from asyppo.rollout.samplers.decode import DecodingSampler
from asyppo.rollout.samplers.generate import GenerateSampler
from asyppo.rollout.samplers.vllm import VLLMSampler, make_vllm_sampler

__all__ = [
    "AGREES",
    "ON_THE_MODEL",
    "SAMPLERS",
    "Alternatives",
    "ContinuousBatchingSampler",
    "DecodingSampler",
    "DividedSampler",
    "EngineError",
    "GenerateSampler",
    "HoldsWeights",
    "NamedWeights",
    "Response",
    "Sampler",
    "SamplerFactory",
    "SamplesAhead",
    "SentWeights",
    "Sleeps",
    "VLLMSampler",
    "agreement",
    "make_sampler",
    "sampler_factory",
    "sends_weights",
    "settle",
    "tolerance",
]


SamplerFactory = Callable[[Policy, PreTrainedTokenizerBase, AsyPPOConfig], Sampler]


def _ways(
    kinds: Sequence[str], policy: Policy, tokenizer: PreTrainedTokenizerBase, config: AsyPPOConfig
) -> Alternatives:
    """The ways to sample of these kinds, the best first."""
    options: dict[str, Any] = {
        "eos_token_ids": eos_token_ids(policy.model, tokenizer),
        "pad_token_id": pad_token_id(tokenizer),
        "batch_size": config.generation_batch_size,
        "dtype": policy.dtype,
    }
    max_tokens = config.max_tokens_per_micro_batch
    few = {"batch_size": max(1, min(config.generation_batch_size, max_tokens // config.max_completion_length))}
    generate = partial(GenerateSampler, policy.model, **options)
    ways: dict[str, dict[str, Callable[[], Sampler]]] = {
        "continuous": {"continuous batching": partial(ContinuousBatchingSampler, policy.model, **options)},
        "generate": {
            "a cache of keys and values": partial(DecodingSampler, policy.model, max_tokens=max_tokens, **options),
            "transformers' generate": generate,
            "transformers' generate on prompts of one length": partial(generate, pads=False),
            "transformers' generate without a cache": partial(generate, pads=False, cache=False, **few),
        },
    }
    return Alternatives({name: make for kind in kinds for name, make in ways[kind].items()})


def _auto(policy: Policy, tokenizer: PreTrainedTokenizerBase, config: AsyPPOConfig) -> Sampler:
    attention = str(policy.model.config._attn_implementation)
    # With other attention each token of continuous batching is masked against the cache of the whole batch.
    paged = policy.device.type == "cuda" and ("flash" in attention or "paged" in attention)
    kinds = ["continuous", "generate"] if paged else ["generate"]
    return _ways(kinds, policy, tokenizer, config)


SAMPLERS: dict[str, SamplerFactory] = {
    "auto": _auto,
    "generate": partial(_ways, ["generate"]),
    "continuous": partial(_ways, ["continuous"]),
    "vllm": make_vllm_sampler,
}
"""The built-in ones by name. One's own is a function like these."""

ON_THE_MODEL = ("auto", "generate", "continuous")
"""Those that decode with the policy's own model."""


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


def sends_weights(sampler: Sampler, engine: Sampler, policy: Policy) -> Sampler:
    """Return ``sampler``, which calls ``engine``, with what sends that the policy's weights where it has a copy."""
    return SentWeights(sampler, engine, policy.weights) if isinstance(engine, HoldsWeights) else sampler
