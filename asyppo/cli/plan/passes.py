"""What a forward pass keeps for the backward pass: counted by running it on fake tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from asyppo.cli.plan.models import Model, from_config, layers_of
from asyppo.models.critics.side import SideCritic, SideShape


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch."""

    kept: int
    """By the forward pass for the backward pass."""
    layer: int
    """By one layer of it."""
    casts: int
    """Copies of weights in the precision of the pass."""


_COUNTED: dict[tuple[Any, ...], Activations] = {}


def activations(
    model: Model, rows: int, width: int, dtype: torch.dtype, checkpointing: bool, *, sharded: bool = False
) -> Activations:
    """Count what a forward pass over int64 [rows, width] tokens, some of them padding, keeps for the backward pass.

    The pass runs on fake tensors, which have shapes and no memory. With ``checkpointing`` a layer keeps its input only.
    Weights that are ``sharded`` are gathered in ``dtype``, and so is the stream; under autocast that is float32.
    Layers that go through the tokens one by one would take minutes: what they keep is at most quadratic in the width,
    and found from three short passes.
    """
    short = (64, 128, 192)
    how = dtype, checkpointing, sharded
    if width <= max(short) or not model.goes_token_by_token:
        key = model.config.to_json_string(), model.is_critic, rows, width, how
        if key not in _COUNTED:
            _COUNTED[key] = _counted(model, rows, width, *how)
        return _COUNTED[key]
    counts = [_counted(model, rows, w, *how) for w in short]
    # Lagrange's polynomial through the three.
    weights = [math.prod((width - other) / (own - other) for other in short if other != own) for own in short]
    kept, layer = (
        round(sum(w * getattr(c, name) for w, c in zip(weights, counts, strict=True))) for name in ("kept", "layer")
    )
    return Activations(kept, layer, counts[0].casts)


def _counted(
    model: Model, rows: int, width: int, dtype: torch.dtype, checkpointing: bool, sharded: bool
) -> Activations:
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = from_config(model.config, model.is_critic, dtype if sharded else torch.float32)
        body = made.base_model
        with _counting(made) as count, _GroupedProducts():
            ids = torch.zeros(rows, width, dtype=torch.int64)
            mask = torch.ones_like(ids)
            with torch.autocast("cpu", dtype=torch.bfloat16) if dtype != torch.float32 else nullcontext():
                hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    inputs = hidden.numel() * hidden.element_size()
    largest = max(count.by_layer, default=0)
    kept = count.total
    if checkpointing:
        kept += sum(min(0, inputs - size) for size in count.by_layer)
    return Activations(kept, largest, count.casts)


def side_activations(shape: SideShape, rows: int, width: int, dtype: torch.dtype) -> Activations:
    """As ``activations``, of a side critic that reads ``width`` states of each of ``rows`` responses."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = SideCritic(shape)
        with _counting(made) as count:
            states = torch.zeros(rows, width, shape.states_size, dtype=dtype)
            inputs = torch.zeros(rows, width, len(shape.policy_inputs)) if shape.policy_inputs else None
            with torch.autocast("cpu", dtype=torch.bfloat16) if dtype != torch.float32 else nullcontext():
                made(states, inputs)
    return Activations(count.total, max(count.by_layer, default=0), count.casts)


class _GroupedProducts(TorchFunctionMode):
    """Experts' products, [N, in] by [E, in, out], as one of the same size: torch's own have no fake form in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) in ("grouped_mm", "_grouped_mm"):
            return args[0] @ args[1][0]
        return func(*args, **(kwargs or {}))


class _Count:
    """Bytes that autograd has saved, each storage once."""

    def __init__(self, model: nn.Module):
        self.total = 0
        self.casts = 0
        self.by_layer: list[int] = []
        self.linear = Counter(tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear))
        # Storages are kept, so that none gets the address of another. The weights themselves do not count.
        self.seen = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Autograd saves ``tensor``."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.seen:
            return tensor
        self.seen[storage._cdata] = storage
        shapes = [tuple(tensor.shape), tuple(tensor.shape)[::-1]]
        cast = next((s for s in shapes if tensor.dtype != torch.float32 and self.linear[s] > 0), None)
        if cast is None:
            self.total += storage.nbytes()
        else:
            self.linear[cast] -= 1
            self.casts += storage.nbytes()
        return tensor


@contextmanager
def _counting(model: nn.Module) -> Iterator[_Count]:
    """Count the bytes that autograd saves, other than the weights themselves, and those of each layer."""
    count = _Count(model)
    before: list[int] = []
    hooks = []
    for layer in layers_of(model):
        hooks.append(layer.register_forward_pre_hook(lambda *_: before.append(count.total)))
        hooks.append(layer.register_forward_hook(lambda *_: count.by_layer.append(count.total - before.pop())))
    with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda tensor: tensor):
        yield count
    for hook in hooks:
        hook.remove()
