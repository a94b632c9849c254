"""Families of transformers whose layers are written out here, too: for critics, and for decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model


def _window_of_config(layer: Any, config: Any) -> int | None:
    return config.sliding_window


def _window_of_layer(layer: Any, config: Any) -> int | None:
    return layer.self_attn.sliding_window


def _no_window(layer: Any, config: Any) -> int | None:
    return None


# How far a layer of each family looks back. Exact classes: a subclass may compute something else.
FAMILIES: dict[type, Callable[[Any, Any], int | None]] = {
    LlamaModel: _no_window,
    MistralModel: _window_of_config,
    Qwen2Model: _window_of_layer,
    Qwen3Model: _window_of_layer,
}

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a layer."""


def why_unknown(model: Any) -> str | None:
    """Return why the layers of ``model`` are not known here, None if they are."""
    body: Any = model.base_model
    if type(body) not in FAMILIES:
        names = ", ".join(family.__name__ for family in FAMILIES)
        return f"{type(body).__name__} is none of {names}"
    if body.config.hidden_act != "silu":
        return f"its activation is {body.config.hidden_act}, not silu"
    return None
