"""Models sharded over a mesh with FSDP2: what is stored in pieces, what is gathered when, and what is summed.

Shards, gradient sums and optimizer state are float32. A layer is gathered in the dtype that it computes in, for its own
forward and backward pass; embeddings and heads belong to the root module, so its ``forward`` sees them whole. Gradients
are summed over ranks, not averaged: token weights carry every normalisation.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from asyppo.distributed.processes import rank, sum_over_ranks

T = TypeVar("T")


def shard(
    module: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    *,
    whole: Collection[nn.Parameter] = (),
    **options: Any,
) -> None:
    """Shard ``module`` over ``mesh`` in place: each of ``layers`` on its own, the rest of it as the root. Passes run in
    ``dtype``; parameters that are to be ``whole`` on every rank stay as they are; ``options`` go to ``fully_shard``."""
    for parameter in whole:  # fully_shard puts the others on the device
        parameter.data = parameter.to(mesh.device_type).data  # of one in 4 bits this moves the scales, too
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the loss's float32 arguments are among them
    )
    # Outputs of custom ops count as views. Nothing writes to them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for part in (*layers, module):
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=set(whole) or None, **options)
    for sharded in fsdp_modules(module):
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other


def fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    """Return the parts of ``module`` that FSDP2 gathers one by one, the root first."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def release(module: nn.Module) -> None:
    """Give back what the root of ``module`` has gathered: it keeps that after a pass, for a backward pass to come."""
    for root in fsdp_modules(module)[:1]:
        root.reshard()


def between_replicas_once(module: nn.Module, passes: Iterable[T]) -> Iterator[T]:
    """Yield ``passes``, each of which runs ``module`` forward and backward. Where ``mesh`` has replicas, gradients are
    summed over these in the last pass only."""
    parts = fsdp_modules(module)[:1]
    waiting: list[T] = []
    for one in passes:
        for part in parts:
            part.set_requires_all_reduce(False)
        yield from waiting
        waiting = [one]
    for part in parts:
        part.set_requires_all_reduce(True)
    yield from waiting


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a Hugging Face model, sharded or not: the modules that it says are not to be split."""
    names: set[str] = set()
    for part in model.modules():
        names.update(getattr(part, "_no_split_modules", None) or ())
    return [part for part in model.modules() if type(part).__name__.removeprefix("FSDP") in names]


def placement_of_stacked(mesh: DeviceMesh) -> Callable[[Tensor], Shard | None]:
    """Return the rule by which parameters [M, …] are cut: along the first dimension after M that divides evenly among
    the ranks; None where there is none. Frozen parameters, which no optimizer steps, are cut along their first."""
    parts = mesh["shard"].size()

    def place(parameter: Tensor) -> Shard | None:
        if not parameter.requires_grad:
            return Shard(0)
        even = (d for d in range(1, parameter.dim()) if parameter.shape[d] % parts == 0)
        dimension = next(even, None)
        return None if dimension is None else Shard(dimension)

    return place


def member(stacked: Tensor, m: int, mesh: DeviceMesh | None) -> Tensor:
    """Return the part of critic ``m``, a view, of a stacked parameter or gradient.

    Where ``mesh`` shards others, what is whole on every rank becomes a replicated DTensor, since one optimizer cannot
    take both kinds.
    """
    part = stacked.detach()[m]
    if mesh is None or isinstance(part, DTensor):
        return part
    return DTensor.from_local(part, mesh, [Replicate()] * mesh.ndim, run_check=False)


@torch.no_grad()
def sum_whole_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of those ``parameters`` that are whole on every rank, in one all-reduce; FSDP2 has summed those
    of the others."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if gradients:
        summed = sum_over_ranks(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def whole_weights(module: nn.Module, *, tied: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of ``module`` by name, whole, one part after another, the root last: one all-gather a layer
    where they are sharded, by all ranks. Each is only good until the next; what is whole on every rank comes with its
    layer. ``tied``: weights that are one tensor come under each of their names."""
    parts: list[tuple[str, Any]] = [(at, part) for at, part in module.named_modules() if isinstance(part, FSDPModule)]
    if not parts:
        yield from ((name, p.detach()) for name, p in module.named_parameters(remove_duplicate=not tied))
    given: set[str] = set()
    for place, part in (*parts[1:], *parts[:1]):
        part.unshard()
        for name, parameter in part.named_parameters(place, remove_duplicate=not tied):
            if not isinstance(parameter, DTensor) and name not in given:
                given.add(name)
                yield name, parameter.detach()
        part.reshard()


class WholeCopy:
    """A copy of ``module`` that computes in ``dtype`` and holds memory only while it is filled.

    For generation: FSDP2 would communicate for each token, while ranks generate different numbers of tokens; and where
    it gathers once and keeps, its hooks still run in each layer for each token.
    """

    def __init__(
        self, module: nn.Module, dtype: torch.dtype, device: torch.device, shared: Collection[nn.Parameter] = ()
    ):
        """Make the copy before ``module`` is sharded. Weights are never in memory twice; those that are ``shared`` are
        the module's own, and so are their scales, if they are in 4 bits."""
        self.shared = shared
        empty: dict[int, Any] = {id(own): own for p in shared for own in (p, getattr(p, "quant_state", None))}
        for parameter in (p for p in module.parameters() if p not in shared):
            like = torch.empty_like(parameter, dtype=dtype, device=device)
            empty[id(parameter)] = nn.Parameter(like, requires_grad=False)
            like.untyped_storage().resize_(0)
        self.module: Any = copy.deepcopy(module, empty).to(device)

    @torch.no_grad()
    def fill(self, source: nn.Module) -> None:
        """Take the weights of ``source``, of which this is a copy: one all-gather a layer."""
        own = {name: p for name, p in self.module.named_parameters() if p not in self.shared}
        for parameter in own.values():
            parameter.untyped_storage().resize_(parameter.numel() * parameter.element_size())
        for name, weight in whole_weights(source, tied=False):
            if name in own:
                own[name].copy_(weight)

    def empty(self) -> None:
        """Give the memory of the weights back."""
        for parameter in self.module.parameters():
            if parameter not in self.shared:
                parameter.untyped_storage().resize_(0)

    @contextmanager
    def of(self, source: nn.Module) -> Iterator[None]:
        """Hold the weights of ``source`` for the time inside."""
        self.fill(source)
        try:
            yield
        finally:
            self.empty()


@contextmanager
def whole_on_main(*modules: nn.Module) -> Iterator[None]:
    """Inside, ``modules`` have their weights whole, on the CPU of rank 0, for code there that knows nothing of shards,
    such as ``save_pretrained``. On other ranks they are not to be used meanwhile."""
    whole: dict[int, nn.Parameter | None] = {}
    sharded = []
    for module in modules:
        release(module)
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if not isinstance(parameter, DTensor):
                    continue
                sharded.append((part, name, parameter))
                if id(parameter) not in whole:  # tied weights stay tied
                    gathered = parameter.full_tensor().detach()  # by all ranks
                    whole[id(parameter)] = (
                        nn.Parameter(gathered.cpu(), parameter.requires_grad) if rank() == 0 else None
                    )
    try:
        for part, name, parameter in sharded if rank() == 0 else ():
            setattr(part, name, whole[id(parameter)])
        yield
    finally:
        for part, name, parameter in sharded:
            setattr(part, name, parameter)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's piece of a sharded tensor; any other tensor is its own piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ranks hold different pieces of ``tensor``."""
    return isinstance(tensor, DTensor) and any(placement.is_shard() for placement in tensor.placements)


@torch.no_grad()
def total_norms(sets: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the Euclidean norm of each set of gradients, [number of sets], the same on every rank.

    One all-reduce in all, where ``torch.nn.utils.get_total_norm`` has one for each sharded gradient.
    """
    device = next((local(g).device for own in sets for g in own), None)

    def norm(gradients: list[Tensor]) -> Tensor:
        return nn.utils.get_total_norm(gradients).to(device)  # of none it is on the CPU

    whole = torch.stack([norm([local(g) for g in own if not is_sharded(g)]) for own in sets])
    first = next((g for own in sets for g in own if is_sharded(g)), None)
    if not isinstance(first, DTensor):
        return whole
    squares = torch.stack([norm([local(g) for g in own if is_sharded(g)]) for own in sets]).square()
    dist.all_reduce(squares, group=first.device_mesh.get_group("shard"))
    return (squares + whole.to(squares).square()).sqrt()


@torch.no_grad()
def clip_gradients(gradients: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale ``gradients``, whose ``total_norm`` is ``norm``, down to ``max_norm`` where it is above."""
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
