"""Gradient checkpointing that changes nothing but memory and time.

transformers checkpoints a layer in training mode only, which switches on what dropout the layer has of its own, and its
backward pass computes the layer again in whatever mode it finds it in then. Here layers stay in eval mode throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from asyppo.config import ConfigError
from asyppo.distributed.sharding import decoder_layers

# Parameters whose gradients are compared at the start: norms, biases, adapters, whatever the size of the model.
SMALL = 2**20


class Checkpointed:
    """What a layer has for its ``forward``: where gradients are wanted, it keeps its input and is computed again."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward, self.enabled = forward, True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A cache would be written twice.
        cached = any(kwargs.get(name) is not None for name in ("past_key_values", "layer_past"))
        if not self.enabled or cached or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(partial(self.forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)


def checkpoint_layers(body: nn.Module, setting: str, *, check: bool = True) -> None:
    """Let the layers of ``body``, a decoder of transformers in eval mode, keep nothing but their input for the backward
    pass, and, to ``check``, compare hidden states and gradients of a short pass with those of a plain one.

    Raises ConfigError, which names ``setting``, where they differ, or where there are no layers to be found.
    """
    layers = [m for m in body.modules() if isinstance(m, GradientCheckpointingLayer)] or decoder_layers(body)
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    wrapped = []
    for layer in layers:
        if id(layer) not in inner:
            layer.forward = Checkpointed(layer.forward)
            wrapped.append(layer.forward)
    name = type(body).__name__
    if not wrapped:
        raise ConfigError(f"{setting}: got True, needs False for {name}: it does not say what its layers are")
    if not check:
        return
    found = _hidden_and_gradient(body)
    for forward in wrapped:
        forward.enabled = False
    plain = _hidden_and_gradient(body)
    for forward in wrapped:
        forward.enabled = True
    # Of two passes of the same arithmetic; on a GPU sums of experts' outputs may come in another order.
    half = torch.is_autocast_enabled(next(body.parameters()).device.type)
    for what, one, other in zip(("hidden states", "gradients"), found, plain, strict=True):
        off = float((one - other).norm() / other.norm())
        if not off <= (1e-2 if half else 1e-4):
            raise ConfigError(
                f"{setting}: got True, needs False for {name}: {what} of its layers computed again are {off:.1%} off"
            )


def _hidden_and_gradient(body: Any) -> tuple[Tensor, Tensor]:
    """Last hidden states, and the gradients of a function of them with respect to small parameters, flat."""
    device = next(body.parameters()).device
    ids = torch.arange(5, device=device)[None] % body.config.get_text_config().vocab_size
    trained = sorted((p for p in body.parameters() if p.requires_grad), key=torch.Tensor.numel)
    small = [p for p in trained if p.numel() <= SMALL] or trained[:1]
    with torch.enable_grad():
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state.float()
        if not hidden.requires_grad:
            return hidden, hidden
        weight = torch.linspace(-1, 1, hidden.numel(), device=device).view_as(hidden)
        gradients = torch.autograd.grad((hidden * weight).sum(), small, allow_unused=True)
    return hidden.detach(), torch.cat([g.float().flatten() for g in gradients if g is not None])
