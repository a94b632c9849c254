"""A custom op's arguments by name.

``torch.library`` and ``torch.autograd.Function`` hand a backward its inputs by position, and so take their gradients
back. The positions are read from the signature of the op's forward, so that an argument more moves nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor


class Signature:
    """The names of a function's positional arguments, in order."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.names = tuple(inspect.signature(function).parameters)

    def index(self, name: str) -> int:
        """The position of an argument."""
        return self.names.index(name)

    def named(self, values: Sequence[Any]) -> dict[str, Any]:
        """One value an argument (``inputs``, ``ctx.needs_input_grad``) by the arguments' names."""
        return dict(zip(self.names, values, strict=True))

    def gradients(self, by_name: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
        """What a backward returns: these gradients at their arguments' positions, None at all others."""
        unknown = set(by_name) - set(self.names)
        if unknown:
            raise ValueError(f"by_name: got {', '.join(sorted(unknown))}, needs names among {', '.join(self.names)}")
        return tuple(by_name.get(name) for name in self.names)
