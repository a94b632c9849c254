"""From what a user gives (a path, a model, nothing) and a configuration to policy and critics."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.distributed.processes import world_size
from asyppo.models.critics import Critics, load_critics
from asyppo.models.policy import Policy, compute_dtype


def choose_device(config: AsyPPOConfig) -> torch.device:
    """Return the device that ``config`` asks for. Raises ConfigError if it asks for a GPU and there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: got 'cuda', but torch finds no GPU; needs 'auto' or 'cpu' here")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def policy_of(policy: Policy | PreTrainedModel | str, config: AsyPPOConfig, **changes: Any) -> Policy:
    """Return the policy that ``config`` asks for: of a model by directory or hub name, put on its device, or around a
    causal language model, which stays where it is. A Policy stays itself. ``changes`` go to Policy, in place of what
    ``config`` says. Raises ConfigError."""
    if isinstance(policy, Policy):
        return policy
    options: dict[str, Any] = {
        "temperature": config.temperature,
        "gradient_checkpointing": config.policy.gradient_checkpointing,
    } | changes
    if isinstance(policy, PreTrainedModel):
        # Optimizer steps at a learning rate of 1e-6 would round away in anything less.
        return Policy(policy.float(), dtype=compute_dtype(config.policy.dtype, policy.device), **options)
    lora = {
        "r": config.policy.lora_r,
        "alpha": config.policy.lora_alpha,
        "target_modules": config.policy.lora_target_modules,
    }
    return Policy.from_pretrained(policy, lora=lora if config.policy.use_peft else None, **_shared(config), **options)


def critics_of(critics: Critics | str | None, config: AsyPPOConfig, policy: Policy) -> Critics | None:
    """Return the critics that ``config`` asks for, of a checkpoint by directory or hub name; new value heads follow
    from ``config.seed``. Critics stay themselves, and so does None. Raises ConfigError."""
    if not isinstance(critics, str):
        return critics
    if not config.num_critics:
        raise ConfigError(f"critics: got {critics!r}, needs None for algorithm {config.algorithm}")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        options = _shared(config) | {"device": policy.device}
        return load_critics(critics, config.num_critics, config.critic, **options)


def _shared(config: AsyPPOConfig) -> dict[str, Any]:
    device = choose_device(config)
    return {
        "dtype": compute_dtype(config.policy.dtype, device),
        # What is sharded gets to its GPU in pieces, since as a whole it may not fit.
        "device": torch.device("cpu") if world_size() > 1 else device,
        "attn_implementation": config.policy.attn_implementation,
        "trust_remote_code": config.policy.trust_remote_code,
    }


def prompt_limit(config: AsyPPOConfig, policy: Policy, critics: Critics | None) -> int:
    """Return how many tokens a prompt may have, so that the longest response fits in every model's positions."""
    return room_for_prompts(config, [m.config for m in (policy.model, critics) if m is not None])


def room_for_prompts(config: AsyPPOConfig, models: Sequence[PreTrainedConfig]) -> int:
    """Return how many of the positions of ``models`` the longest response leaves. Raises ConfigError if none."""
    texts = [model.get_text_config() for model in models]
    names = ("max_position_embeddings", "max_seq_len")  # the latter is MPT's
    positions = [next((n for name in names if (n := getattr(t, name, None))), sys.maxsize) for t in texts]
    if config.max_completion_length >= min(positions):
        raise ConfigError(
            f"max_completion_length: got {config.max_completion_length}, needs less than the {min(positions)} "
            "positions of the models, so that a prompt fits, too"
        )
    return min(positions) - config.max_completion_length
