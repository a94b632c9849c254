"""How an op is registered, which way a call of it takes, and its arguments by name.

``torch.library`` and ``torch.autograd.Function`` hand a backward its inputs by position, and so take their gradients
back. The positions are read from the signature of the op's forward, so that an argument more moves nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_function_stack_at,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch.nn import Parameter
from torch.utils._device import DeviceContext


class Signature:
    """The names of a function's positional arguments, in order."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._signature = inspect.signature(function)
        self.names = tuple(self._signature.parameters)

    def index(self, name: str) -> int:
        """The position of an argument."""
        return self.names.index(name)

    def named(self, values: Sequence[Any]) -> dict[str, Any]:
        """One value an argument (``inputs``, ``ctx.needs_input_grad``) by the arguments' names."""
        return dict(zip(self.names, values, strict=True))

    def positional(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """All arguments by position, defaults included."""
        if not kwargs and len(args) == len(self.names):
            return args
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def gradients(self, by_name: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
        """What a backward returns: these gradients at their arguments' positions, None at all others."""
        unknown = set(by_name) - set(self.names)
        if unknown:
            raise ValueError(f"by_name: got {', '.join(sorted(unknown))}, needs names among {', '.join(self.names)}")
        return tuple(by_name.get(name) for name in self.names)


class Op:
    """An op that changes none of its arguments: one definition, and two ways to it.

    The registered op stands for whatever looks at ops, and costs the host several times what the other way does. In
    plain eager mode nobody looks: a call runs ``forward`` as it is, within a ``torch.autograd.Function`` if a gradient
    is needed. Both ways run the same forward, ``setup_context`` and backward, so they give the same bits.

    Registered go calls under ``torch.compile`` and export, under dispatch and function modes (fake, functional,
    selective checkpointing, FLOP counters), in functorch's transforms and tracers, and with subclasses of Tensor, meta
    tensors and lazy negatives. So does a backward that is itself to be differentiated: it has no formula, which the
    registered op says when it is asked for it.

    Args:
        name: ``"namespace::name"``.
        forward: from positional arguments to one Tensor or a tuple of Tensors, none of which shares memory with an
            argument; typed, since the schema is read from the types.
        tags: of the registered op.
    """

    def __init__(self, name: str, forward: Callable[..., Any], *, tags: Sequence[torch.Tag] = ()) -> None:
        self.name = name
        self.forward = forward
        self.signature = Signature(forward)
        self.registered = torch.library.custom_op(name, forward, mutates_args=(), tags=tags)
        self.function: type[torch.autograd.Function] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Decorate the function that returns empty outputs of the right shape and dtype."""
        return self.registered.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Give the op a derivative, in the terms of ``torch.library.register_autograd``.

        What ``backward`` computes below torch's own ops is an ``Op``, too, without a derivative.
        """
        self.registered.register_autograd(backward, setup_context=setup_context)
        compute = self.forward

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = compute(*inputs)
            setup_context(ctx=ctx, inputs=inputs, output=output)
            ctx.eager = True
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.function = type(self.name.rpartition(":")[2], (torch.autograd.Function,), members)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take the way that this call asks for."""
        if torch.compiler.is_compiling() or _somebody_looks():
            return self.registered(*args, **kwargs)
        args = self.signature.positional(args, kwargs)
        needs_grad = False
        for x in args:
            if isinstance(x, Tensor):
                if not _is_plain(x):
                    return self.registered(*args)
                needs_grad = needs_grad or x.requires_grad
        if not (needs_grad and torch.is_grad_enabled()):
            return self.forward(*args)
        return self.registered(*args) if self.function is None else self.function.apply(*args)


def define(name: str) -> Callable[[Callable[..., Any]], Op]:
    """Decorate the forward of an ``Op`` that has no derivative."""
    return lambda forward: Op(name, forward)


def is_last_use(ctx: Any) -> bool:
    """Within an op's backward: whether what it saved may be overwritten. The call came the eager way, where outputs for
    the backward alone reach nobody else, and the graph goes after this."""
    plain = getattr(ctx, "eager", False) and not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    return plain and not _get_current_graph_task_keep_graph()


def _somebody_looks() -> bool:
    """Whether a mode, a transform or a tracer is active. A default device is a mode that looks at constructors only."""
    functions = _len_torch_function_stack()
    return bool(
        _len_torch_dispatch_stack()
        or (functions and any(type(_get_function_stack_at(i)) is not DeviceContext for i in range(functions)))
        or _are_functorch_transforms_active()
        or _get_tracing_state()
    )


def _is_plain(x: Tensor) -> bool:
    """Whether memory is all there is to a tensor."""
    return (type(x) is Tensor or type(x) is Parameter) and not (x.is_meta or x.is_neg())
