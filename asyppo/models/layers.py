"""What comes out of a policy's layers, where something reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyppo.config import ConfigError
from asyppo.distributed.sharding import decoder_layers


def numbered(model: PreTrainedModel, layers: Sequence[int]) -> tuple[int, ...]:
    """Return ``layers``, some of which count from the last one, -1, as counted from 1. Raises ConfigError for one that
    ``model`` does not have."""
    count = model.config.get_text_config().num_hidden_layers
    found = tuple(layer if layer > 0 else count + 1 + layer for layer in layers)
    if not all(layer != 0 and 1 <= number <= count for layer, number in zip(layers, found, strict=True)):
        raise ConfigError(
            f"critic.side.layers: got {list(layers)}, needs layers of the policy, 1 to {count}, or -{count} to -1"
        )
    inner = [number for number in found if number < count]
    if inner and len(decoder_layers(model)) != count:
        raise ConfigError(
            f"critic.side.layers: got {list(layers)}, needs [-1] for {type(model).__name__}, whose layers are not "
            "modules of one class that it names"
        )
    return found


def size_of(model: PreTrainedModel, layers: Sequence[int]) -> int:
    """Return how many numbers come out of ``layers``, counted from 1, for one token."""
    text, head = model.config.get_text_config(), model.get_output_embeddings().weight.shape[1]
    return sum(head if number == text.num_hidden_layers else text.hidden_size for number in layers)


@contextmanager
def outputs_of(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, note what comes out of these ``layers`` of ``model``, counted from 1, but for the last one: whoever runs
    the model has that behind the final norm."""
    found: dict[int, Tensor] = {}
    hooks = []
    if layers:
        modules = decoder_layers(model)
        for number in layers:
            if number < model.config.get_text_config().num_hidden_layers:

                def note(module: Any, inputs: Any, output: Any, number: int = number) -> None:
                    found[number] = output[0] if isinstance(output, tuple) else output

                hooks.append(modules[number - 1].register_forward_hook(note))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def of_size_one(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return hidden states [N, H] divided by their root mean square, in ``dtype``: what differs between layers and
    models by orders of magnitude, and grows with training, is their scale."""
    hidden = hidden.float()
    return (hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
