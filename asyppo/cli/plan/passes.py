"""What a pass over a micro-batch takes: counted by running it on fake tensors, forward and backward."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asyppo.cli.plan.attention import stand_in, varlen
from asyppo.cli.plan.models import Model, from_config, layers_of
from asyppo.models.adapters import add_lora
from asyppo.models.critics.layout import Extent
from asyppo.models.critics.loading import value_head
from asyppo.models.critics.lora import LoraCritics
from asyppo.models.critics.side import SideCritic, SideCritics, SideShape
from asyppo.models.critics.stacked import Stacked, StackedCritics
from asyppo.models.families import why_unknown


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch."""

    kept: int
    """By the forward pass for the backward pass."""
    layer: int
    """By the layer of it that keeps most."""
    passing: int
    """The most there is at once in a pass without gradients."""
    back: int
    """The most there is at once in the backward pass beside what is kept and the gradients that have been added up."""
    casts: int
    """Copies of weights in the precision of the pass; the other numbers are without them."""
    further: tuple[int, int] = 0, 0
    """What a layer more, like the last, would add to what is kept, and to the copies."""


FEW = 3
"""Layers from which the others follow."""

_COUNTED: dict[tuple[Any, ...], Activations] = {}


def activations(
    model: Model,
    rows: int,
    width: int,
    dtype: torch.dtype,
    checkpointing: bool,
    *,
    sharded: bool = False,
    stacked: int = 0,
) -> Activations:
    """Count what passes over int64 [rows, width] tokens take.

    They run on fake tensors, which have shapes and no memory. With ``checkpointing`` a layer keeps its input only. Of
    layers that are alike three are looked at, and the others follow. Weights that are ``sharded`` are gathered in
    ``dtype``, and so is the stream; under autocast that is float32. ``stacked``: of so many critics side by side, if
    their layers can be, each with its part of the rows. Layers that go through the tokens one by one would take
    minutes: what they keep is at most quadratic in the width, and found from three short passes.
    """
    if model.uniform and (more := model.config.num_hidden_layers - FEW) > 0:
        few = activations(model.of_layers(FEW), rows, width, dtype, checkpointing, sharded=sharded, stacked=stacked)
        kept, casts = few.kept + more * few.further[0], few.casts + more * few.further[1]
        return replace(few, kept=kept, casts=casts)
    short = (32, 64, 96)
    how = dtype, checkpointing, sharded, stacked
    if width <= max(short) or not model.goes_token_by_token:
        key = model.config.to_json_string(), model.is_critic, model.rank, str(model.targets), rows, width, how
        if key not in _COUNTED:
            _COUNTED[key] = _counted(model, rows, width, *how)
        return _COUNTED[key]
    counts = [_counted(model, rows, w, *how) for w in short]
    # Lagrange's polynomial through the three.
    weights = [math.prod((width - other) / (own - other) for other in short if other != own) for own in short]
    sizes = [(c.kept, c.layer, c.passing, c.back, c.further[0]) for c in counts]
    kept, layer, passing, back, further = (
        round(sum(w * size for w, size in zip(weights, of, strict=True))) for of in zip(*sizes, strict=True)
    )
    return Activations(kept, layer, passing, back, counts[0].casts, (further, counts[0].further[1]))


def _counted(
    model: Model, rows: int, width: int, dtype: torch.dtype, checkpointing: bool, sharded: bool, stacked: int
) -> Activations:
    precision = dtype if sharded else torch.float32
    if stacked or model.rank:
        with torch.device("meta"):
            made = from_config(model.config, model.is_critic, precision)
            if stacked and why_unknown(made) is None:
                return _of_stacked(_stacked(model, made, stacked, dtype), max(1, rows // stacked), width, checkpointing)
            if model.rank:
                add_lora(made, r=model.rank, alpha=1, target_modules=model.targets)
    with FakeTensorMode(allow_non_fake_inputs=True):
        if model.rank:
            _fake_weights(made, dtype)
        else:
            made = from_config(model.config, model.is_critic, precision)
        stand_in(made)
        body = made.eval().base_model

        def forward() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16) if dtype != torch.float32 else nullcontext():
                ids = torch.zeros(rows, width, dtype=torch.int64)
                return body(input_ids=ids, use_cache=False).last_hidden_state

        return _run(made, layers_of(made), forward, checkpointing)


def _stacked(model: Model, made: Any, count: int, dtype: torch.dtype) -> StackedCritics | LoraCritics:
    if model.rank:
        return LoraCritics(made, [value_head(made)] * count, r=model.rank, alpha=1, dtype=dtype)
    return StackedCritics([made, *(copy.deepcopy(made) for _ in range(count - 1))], dtype=dtype)


def side_activations(shape: SideShape, count: int, rows: int, width: int, dtype: torch.dtype) -> Activations:
    """As ``activations``, of ``count`` side critics, each of which reads ``width`` states of as many of ``rows``
    responses."""
    with torch.device("meta"):
        critics = SideCritics([SideCritic(shape) for _ in range(count)], dtype=dtype)
    return _of_stacked(critics, max(1, rows // count), width, checkpointing=False, states=shape.states_size)


def _of_stacked(critics: Stacked, rows: int, width: int, checkpointing: bool, states: int = 0) -> Activations:
    """Of ``critics`` on the meta device that have ``rows`` each; side critics read ``states`` numbers a token."""
    count, tokens, critics.varlen = len(critics), rows * width, varlen

    def forward() -> Tensor:
        ids = torch.zeros(count, rows, width, dtype=torch.int64)
        wanted = torch.zeros(count, tokens, dtype=torch.int64)
        read = torch.zeros(tokens, states, dtype=critics.dtype) if states else None
        names = critics.policy_inputs
        beside = torch.zeros(count, rows, width, len(names)) if names else None
        return critics(ids, None, wanted, Extent(width, tokens, tokens), beside, read, outputs=True)

    with FakeTensorMode(allow_non_fake_inputs=True):
        _fake_weights(critics, critics.dtype)
        return _run(critics, list(critics.layers), forward, checkpointing)


def _fake_weights(made: nn.Module, frozen: torch.dtype) -> None:
    """Give a module on the meta device weights that are fake tensors on a CPU, those that are not trained in the
    precision ``frozen``."""
    fakes: dict[Tensor, nn.Parameter] = {}
    for part in made.modules():
        for name, old in part._parameters.items():
            if old is not None and old not in fakes:
                dtype = old.dtype if old.requires_grad else frozen
                fakes[old] = nn.Parameter(torch.empty(old.shape, dtype=dtype), requires_grad=old.requires_grad)
            part._parameters[name] = None if old is None else fakes[old]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


def _run(
    made: nn.Module, layers: Sequence[nn.Module], forward: Callable[[], Tensor], checkpointing: bool
) -> Activations:
    """Count what ``forward`` takes without gradients, and with its backward pass."""
    weights = list(made.parameters())
    # A gradient is there until it has been added to the sum.
    for weight in weights:
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    with _Count(weights) as without, _GroupedProducts(), torch.no_grad():
        forward()
    before: list[int] = []
    by_layer: list[int] = []
    inputs: list[int] = []
    casts: list[int] = []
    with _Count(weights) as count, _GroupedProducts():

        def begins(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
            inputs.append(given.untyped_storage().nbytes())
            before.append(count.alive)
            casts.append(count.casts)

        for layer in layers:
            layer.register_forward_pre_hook(begins, with_kwargs=True)
            layer.register_forward_hook(lambda *_: by_layer.append(count.alive - before[-1]))
        output = forward()
        kept = count.alive - output.untyped_storage().nbytes()
        count.peak = 0
        torch.autograd.backward(output, torch.zeros((), dtype=output.dtype).expand_as(output))
    back = count.peak - kept
    # Once the next layer begins, what only this one was given is gone; after the last one as much is.
    own = [after - at for at, after in pairwise(before)]
    own += [by_layer[-1] - (by_layer[-2] - own[-1] if own else 0)] if by_layer else []
    if checkpointing:
        kept += sum(min(0, given - size) for given, size in zip(inputs, own, strict=True))
    further = (inputs[-1] if checkpointing else own[-1], casts[-1] - casts[-2]) if len(own) > 1 else (0, 0)
    return Activations(kept, max(by_layer, default=0), without.peak, back, count.casts, further)


class _GroupedProducts(TorchFunctionMode):
    """Experts' products, [N, in] by [E, in, out], as one of the same size: torch's own have no fake form in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) in ("grouped_mm", "_grouped_mm"):
            return args[0] @ args[1][0]
        return func(*args, **(kwargs or {}))


class _Count(TorchDispatchMode):
    """Bytes of the storages that are made inside, while they live, each once; copies of ``weights`` apart."""

    def __init__(self, weights: Sequence[Tensor]):
        super().__init__()
        self.alive = self.peak = self.casts = 0
        self.sizes = {weight.untyped_storage()._cdata: 0 for weight in weights}
        self.references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        of_weight = func is torch.ops.aten._to_copy.default and self._is_weight(args[0])
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                self._begin(tensor.untyped_storage(), of_weight)
        return made

    def _is_weight(self, tensor: Tensor) -> bool:
        key = tensor.untyped_storage()._cdata
        return key in self.sizes and key not in self.references

    def _begin(self, storage: torch.UntypedStorage, of_weight: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.casts += size if of_weight else 0
        self.sizes[key] = 0 if of_weight else size
        self.references[key] = weakref.ref(storage, lambda _: self._end(key))
        self.alive += self.sizes[key]
        self.peak = max(self.peak, self.alive)

    def _end(self, key: int) -> None:
        self.alive -= self.sizes.pop(key)
        del self.references[key]
