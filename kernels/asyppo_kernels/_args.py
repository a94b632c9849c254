"""What every op does before it computes: check its arguments once, and choose a backend.

A check reads shapes, dtypes, devices and Python numbers only, never the values of a tensor, so it costs no host
synchronisation and traces under ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # then Triton kernels run on CPU tensors

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(
    name: str,
    value: Tensor,
    *,
    shape: Sequence[int | None] | None,
    needs: str,
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Raise ValueError naming ``name`` unless ``value`` has this shape (None: any, or any size), dtype and device.

    ``needs`` says the shape in words a caller knows, such as ``"[N] = [6]"``.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: got {type(value).__name__}, needs a tensor of shape {needs}")
    if type(value).__name__ == "DTensor":
        raise ValueError(
            f"{name}: got a DTensor, needs a plain tensor: gather it with .full_tensor(), or call the op inside the "
            "forward of the FSDP root module, where its own parameters are gathered"
        )
    if value.layout != torch.strided:
        raise ValueError(f"{name}: got layout {value.layout}, needs a dense tensor of shape {needs}")
    if shape is not None and (
        value.dim() != len(shape)
        or any(want is not None and got != want for got, want in zip(value.shape, shape, strict=True))
    ):
        raise ValueError(f"{name}: got shape {list(value.shape)}, needs {needs}")
    if value.dtype not in dtypes:
        raise ValueError(f"{name}: got dtype {value.dtype}, needs {' or '.join(str(d) for d in dtypes)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got device {value.device}, needs {device}, as the other arguments")


def check_number(
    name: str,
    value: float,
    needs: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise ValueError naming ``name`` unless the Python number ``value`` is finite and within its bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}: got {value!r}, needs {needs}")
    inside = (value > low if low_open else value >= low) and (value < high if high_open else value <= high)
    finite = -math.inf < value < math.inf  # math.isfinite does not trace where the number is symbolic
    if not (finite and inside):
        raise ValueError(f"{name}: got {value!r}, needs {needs}")


def choose_backend(op: str, backend: str, device: torch.device, *, has_triton: bool) -> Literal["triton", "torch"]:
    """``auto`` is Triton on a GPU where the op has a Triton form, and torch elsewhere.

    Raises ValueError for an unknown name and NotImplementedError when Triton is asked of an op without such a form.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: got {backend!r}, needs one of {', '.join(get_args(Backend))}")
    if backend == "auto":
        return "triton" if has_triton and device.type == "cuda" else "torch"
    if backend == "triton" and not has_triton:
        raise NotImplementedError(f"backend: got 'triton', but {op} has no Triton form yet; needs 'auto' or 'torch'")
    if backend == "triton" and device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "backend: got 'triton' for tensors on cpu, needs a GPU, or TRITON_INTERPRET=1 in the environment"
        )
    return "triton" if backend == "triton" else "torch"


def device_guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The context in which a Triton launch finds the device of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up. Triton's own is made for kernels and takes the host as long as a tensor's creation."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of 2 that is at least n >= 1; see ``cdiv``."""
    return 1 << (n - 1).bit_length()
