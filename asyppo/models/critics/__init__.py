"""The critics: M value models behind one interface, computed together or one after another."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from asyppo.config import CriticConfig
from asyppo.models.critics.base import Critics
from asyppo.models.critics.inputs import policy_inputs, read_also
from asyppo.models.critics.loading import load_value_models, minimise
from asyppo.models.critics.lora import LoraCritics
from asyppo.models.critics.one_by_one import OneByOneCritics
from asyppo.models.critics.optimizer import CriticOptimizer
from asyppo.models.critics.side import SideCritics, SideShape, load_side_critics
from asyppo.models.critics.stacked import StackedCritics
from asyppo.models.critics.tokens import check_tokens
from asyppo.models.families import why_unknown

__all__ = [
    "CriticOptimizer",
    "Critics",
    "LoraCritics",
    "OneByOneCritics",
    "SideCritics",
    "SideShape",
    "StackedCritics",
    "check_tokens",
    "load_critics",
    "load_side_critics",
    "make_critics",
    "policy_inputs",
]

log = logging.getLogger("asyppo")


def load_critics(
    path: str | Sequence[str],
    num_critics: int,
    config: CriticConfig,
    *,
    vocab_size: int | None = None,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Critics:
    """Load the critics that ``config`` asks for from the checkpoint ``path``, or each from its own. Raises ConfigError;
    one cause is that it has embeddings of fewer than ``vocab_size`` tokens."""
    if config.lora_r:
        return LoraCritics.from_pretrained(
            path,
            num_critics,
            r=config.lora_r,
            alpha=config.lora_alpha,
            vocab_size=vocab_size,
            dtype=dtype,
            device=device,
            gradient_checkpointing=config.gradient_checkpointing,
            policy_inputs=config.policy_inputs,
            loss=config.loss,
            load_in_4bit=config.load_in_4bit,
        )
    models = load_value_models(
        path,
        num_critics,
        vocab_size=vocab_size,
        device=device,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    return make_critics(models, config, dtype=dtype)


def make_critics(models: list[Any], config: CriticConfig, *, dtype: torch.dtype = torch.float32) -> Critics:
    """Return critics made of M value models: stacked, unless ``config`` or their architecture is against it."""
    for model in models:
        read_also(model, config.policy_inputs)
        minimise(model, config.loss)
    options: dict[str, Any] = {"dtype": dtype, "gradient_checkpointing": config.gradient_checkpointing}
    if not config.stacked:
        return OneByOneCritics(models, **options)
    reason = why_unknown(models[0])
    if reason is None:
        return StackedCritics(models, **options)
    log.warning("critics run one after another: %s", reason)
    return OneByOneCritics(models, **options)
