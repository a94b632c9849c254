"""From a configuration to a trainer: device, data, models."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from asyppo import warm_start
from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.critics import load_critics
from asyppo.data import load_eval_rows, load_train_rows
from asyppo.policy import Policy, compute_dtype
from asyppo.rewards import resolve_reward_funcs
from asyppo.run import run_path
from asyppo.trainer import AsyPPOTrainer
from asyppo.writers import check_writers


def build_trainer(config: AsyPPOConfig) -> AsyPPOTrainer:
    """Load what ``config`` names and return a trainer of it. Raises ConfigError."""
    if (config.policy.model_name_or_path is None) == (config.warm_start is None):
        raise ConfigError(
            f"policy.model_name_or_path: got {config.policy.model_name_or_path!r}, needs a model, or else "
            "a warm_start; one of the two"
        )
    if config.warm_start is not None and config.critic.model_name_or_path is not None:
        raise ConfigError(
            f"critic.model_name_or_path: got {config.critic.model_name_or_path!r}, needs none where a warm_start makes "
            "the critics"
        )
    # What cannot work shows before the work, not after it.
    run_path(config)
    check_writers(config)
    resolve_reward_funcs(config.reward_funcs)
    device = choose_device(config)
    eval_rows = load_eval_rows(config.data) if config.data.eval_size else []
    train_rows = load_train_rows(config.data, eval_rows)
    policy_path, critic_path = config.policy.model_name_or_path, config.critic.model_name_or_path
    if config.warm_start is not None:
        made = warm_start.build(config.warm_start, config.data, train_rows, device)
        policy_path, critic_path = str(made[0]), str(made[1])
    assert policy_path is not None
    if config.algorithm == "ppo" or critic_path is None:
        critic_path = policy_path

    torch.manual_seed(config.seed)  # new value heads
    shared: dict[str, Any] = {
        "dtype": compute_dtype(config.policy.dtype, device),
        "device": device,
        "attn_implementation": config.policy.attn_implementation,
    }
    policy = Policy.from_pretrained(policy_path, temperature=config.temperature, **shared)
    critics = None
    if config.num_critics:
        vocab_size = policy.model.config.get_text_config().vocab_size
        critics = load_critics(critic_path, config.num_critics, config.critic, vocab_size=vocab_size, **shared)
    return AsyPPOTrainer(
        policy=policy,
        critics=critics,
        tokenizer=load_tokenizer(policy_path),
        reward_funcs=config.reward_funcs,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        config=config,
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. Raises ConfigError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model_name_or_path: {path!r} has no tokenizer: {' '.join(str(error).split())}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one up
        raise ConfigError(f"model_name_or_path: {path!r} has no tokenizer, needs one beside the model")
    return tokenizer


def choose_device(config: AsyPPOConfig) -> torch.device:
    """Return the device that ``config`` asks for. Raises ConfigError if it asks for a GPU and there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: got 'cuda', but torch finds no GPU; needs 'auto' or 'cpu' here")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)
