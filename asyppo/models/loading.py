"""From what a user gives (a path, a model, nothing) and a configuration to policy and critics."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.data.checks import Fit
from asyppo.distributed.processes import forked_rng, world_size
from asyppo.models.adapters import without_peft
from asyppo.models.critics import Critics, SideShape, load_critics, load_side_critics, make_critics
from asyppo.models.critics.loading import load_value_models
from asyppo.models.critics.side import SHAPE as SIDE_SHAPE
from asyppo.models.hub import check_finite, load_config, remember_dtype
from asyppo.models.layers import numbered, size_of
from asyppo.models.policy import Policy, compute_dtype
from asyppo.models.quantized import is_in_4_bits
from asyppo.models.tokenizer import load_tokenizer


def choose_device(config: AsyPPOConfig) -> torch.device:
    """Return the device that ``config`` asks for. Raises ConfigError if it asks for a GPU and there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: got 'cuda', but torch finds no GPU; needs 'auto' or 'cpu' here")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def given_policy(policy: Any) -> Policy | PreTrainedModel | str:
    """Return what a program gives as a policy, a PeftModel as the model in it. Raises ConfigError for anything else
    than these, a causal language model, a Policy, and a directory or hub name."""
    policy = str(policy) if isinstance(policy, Path) else policy
    if hasattr(policy, "get_base_model") and hasattr(policy, "peft_config"):
        return without_peft(policy)
    if isinstance(policy, Policy | PreTrainedModel | str):
        return policy
    raise ConfigError(
        f"policy: got {type(policy).__name__}, needs a causal language model, or where one is: a directory or hub name"
    )


def policy_of(
    policy: Policy | PreTrainedModel | str, config: AsyPPOConfig, *, sharded: bool = False, **changes: Any
) -> Policy:
    """Return the policy that ``config`` asks for: of a model by directory or hub name, put on its device, or around a
    causal language model, which stays where it is. A Policy stays itself. ``changes`` go to Policy, in place of what
    ``config`` says. What is to be ``sharded`` is read then, where it can be; in 4 bits it is loaded whole. Raises
    ConfigError."""
    if not isinstance(policy, str):
        _check_bits("policy", policy, config.policy.load_in_4bit)
    if isinstance(policy, Policy):
        return policy
    options: dict[str, Any] = {
        "temperature": config.temperature,
        "gradient_checkpointing": config.policy.gradient_checkpointing,
    } | changes
    if isinstance(policy, PreTrainedModel):
        check_finite(policy, "policy")
        remember_dtype(policy, policy.dtype)
        # Optimizer steps at a learning rate of 1e-6 would round away in anything less.
        if is_in_4_bits(policy):  # of which transformers refuses a cast
            for parameter in policy.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        else:
            policy = policy.float()
        return Policy(policy, dtype=compute_dtype(config.policy.dtype, policy.device), **options)
    lora = {
        "r": config.policy.lora_r,
        "alpha": config.policy.lora_alpha,
        "target_modules": config.policy.lora_target_modules,
    }
    return Policy.from_pretrained(
        policy,
        lora=lora if config.policy.use_peft else None,
        load_in_4bit=config.policy.load_in_4bit,
        **_shared(config, sharded, config.policy.load_in_4bit),
        **options,
    )


def given_critics(critics: Any, config: AsyPPOConfig) -> Critics | str | list[str] | None:
    """Return what a program gives as critics, one name in a list as that name. Raises ConfigError for what is neither
    critics nor names of checkpoints, one for all critics or one for each."""
    critics = [critics] if isinstance(critics, PreTrainedModel) else critics
    if isinstance(critics, list | tuple):
        names = [str(name) if isinstance(name, Path) else name for name in critics]
        odd = next((name for name in names if not isinstance(name, str)), None)
        if odd is not None:
            raise ConfigError(
                f"critics: got {type(odd).__name__}, needs a directory or hub name of the checkpoint that all start "
                "from, or Critics, which asyppo.models.critics.make_critics makes of token classifiers"
            )
        if len(names) not in (1, config.num_critics):
            raise ConfigError(f"critics: got {len(names)} checkpoints, needs 1 or {config.num_critics}")
        return names[0] if len(set(names)) == 1 else names
    return str(critics) if isinstance(critics, Path) else critics


def critics_of(
    critics: Critics | str | list[str] | None, config: AsyPPOConfig, policy: Policy, *, sharded: bool = False
) -> Critics | None:
    """Return the critics that ``config`` asks for, of a checkpoint by directory or hub name, or each of its own; new
    value heads follow from ``config.seed``. Critics stay themselves, and so does None, but for new side critics in its
    place. ``sharded``: see ``policy_of``. Raises ConfigError."""
    side = config.critic.kind == "side" and config.num_critics > 0
    if not isinstance(critics, str | list) and not (critics is None and side):
        if critics is not None:
            _check_bits("critic", critics, config.critic.load_in_4bit)
        return critics
    if not config.num_critics:
        raise ConfigError(f"critics: got {critics!r}, needs None for algorithm {config.algorithm}")
    with forked_rng():
        torch.manual_seed(config.seed)
        options = _shared(config, sharded, config.critic.load_in_4bit)
        if not sharded:
            options["device"] = policy.device
        if side:
            layers = numbered(policy.model, config.critic.side.layers)
            return load_side_critics(
                critics,
                config.num_critics,
                SideShape.of(config.critic, layers, size_of(policy.model, layers)),
                dtype=options["dtype"],
                device=torch.device("cpu") if sharded else policy.device,
                gradient_checkpointing=config.critic.gradient_checkpointing,
            )
        assert critics is not None
        for path in [critics] if isinstance(critics, str) else critics:
            if (Path(path) / SIDE_SHAPE).exists():
                raise ConfigError(f"critic.kind: got 'mini', needs 'side' for {path!r}, which is a side critic")
        if isinstance(critics, str):
            return load_critics(critics, config.num_critics, config.critic, **options)
        if config.critic.lora_r:
            return load_critics(critics, config.num_critics, config.critic, **options)
        dtype = options.pop("dtype")
        models = load_value_models(critics, config.num_critics, vocab_size=None, **options)
        shapes = [[(name, p.shape) for name, p in model.named_parameters()] for model in models]
        alike = all(other == shapes[0] for other in shapes)
        return make_critics(models, replace(config.critic, stacked=config.critic.stacked and alike), dtype=dtype)


def _shared(config: AsyPPOConfig, sharded: bool, in_4_bits: bool) -> dict[str, Any]:
    device = place = choose_device(config)
    if not in_4_bits and (sharded or world_size() > 1):  # what is in 4 bits every rank has whole
        place = torch.device("meta" if sharded else "cpu")
    return {
        "dtype": compute_dtype(config.policy.dtype, device),
        "device": place,
        "attn_implementation": config.policy.attn_implementation,
        "trust_remote_code": config.policy.trust_remote_code,
    }


def _check_bits(branch: str, given: nn.Module, in_4_bits: bool) -> None:
    """Raise ConfigError if what is ``given`` was to be kept ``in_4_bits`` and is not: that is done in loading."""
    if in_4_bits and not is_in_4_bits(given):
        raise ConfigError(
            f"{branch}.load_in_4bit: got True and a {type(given).__name__} with whole weights, needs one that was "
            "loaded in 4 bits, or where to load one from: a directory or hub name"
        )


def tokenizer_of(policy: Policy | PreTrainedModel | str, config: AsyPPOConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies beside the policy's weights. Raises ConfigError."""
    if isinstance(policy, str):
        load_config(policy, setting="policy.model_name_or_path", trust_remote_code=config.policy.trust_remote_code)
        path = policy
    else:
        path = (policy.model if isinstance(policy, Policy) else policy).name_or_path
    return load_tokenizer(path, config.policy.trust_remote_code)


def fit_of(
    config: AsyPPOConfig,
    policy: Policy | PreTrainedModel | str,
    critics: Critics | str | list[str] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Fit:
    """Return what a prompt has to fit: ``tokenizer``, the positions of the models and the embeddings of the policy.
    Models by name are not loaded, their configurations are. Raises ConfigError, also where no position is left."""
    models = [_config_of(policy, config, "policy.model_name_or_path"), *critic_configs(critics, config)]
    return Fit(tokenizer, room_for_prompts(config, models), getattr(models[0].get_text_config(), "vocab_size", None))


def critic_configs(critics: Critics | str | list[str] | None, config: AsyPPOConfig) -> list[PreTrainedConfig]:
    """Return the configurations of ``critics``, models or names, which are not loaded; none for an algorithm without,
    nor of side critics, which read no tokens. Raises ConfigError."""
    if critics is None or not config.num_critics or config.critic.kind == "side":
        return []
    several = critics if isinstance(critics, list) else [critics]
    return [_config_of(one, config, "critic.model_name_or_path") for one in several]


def _config_of(model: Any, config: AsyPPOConfig, setting: str) -> PreTrainedConfig:
    if isinstance(model, str):
        return load_config(model, setting=setting, trust_remote_code=config.policy.trust_remote_code)
    return (model.model if isinstance(model, Policy) else model).config


def longest_sequence(config: AsyPPOConfig, policy: Policy) -> int:
    """Return how many tokens of prompt and response together the sampler of ``policy`` can be asked for."""
    positions = room_for_prompts(config, [policy.model.config]) + config.max_completion_length
    if config.sampler != "vllm":
        return positions
    bound = config.vllm.max_model_len
    if bound is None and config.data.max_prompt_length is not None:
        bound = config.data.max_prompt_length + config.max_completion_length
    return positions if bound is None else min(positions, bound)


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
