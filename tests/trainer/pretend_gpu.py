"""A GPU that is not there: tensors on it, on torch's meta device, have shapes and types, and no numbers.

What runs in ``pretended_gpu`` finds two kinds of fault without a GPU: operations on tensors of two devices, which raise
here, and places where the host waits for the device to read a number from it, which are noted.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
# Indices may be on the CPU.
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# The size of what they give is a number of the device.
OF_UNKNOWN_SIZE = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.bincount.default}


class PretendedGPU(TorchDispatchMode):
    """A number that is read from the device is 0, or True; a choice of elements takes all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        """Who read from the device, one line of our code each."""

    def read(self) -> None:
        """Note a read."""
        ours = [f for f in traceback.extract_stack() if "/asyppo/" in f.filename or "/asyppo_kernels/" in f.filename]
        self.reads.append(f"{ours[-1].filename.rsplit('/', 1)[-1]}: {ours[-1].line}" if ours else "not ours")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(x.is_meta for x in tensors):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.read()
            return {torch.bool: True}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
        if func is aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            self.read()
            return args[0].new_empty(args[1][0].numel(), *args[0].shape[args[1][0].dim() :])
        if func in OF_UNKNOWN_SIZE:
            raise RuntimeError(f"{func}: the size of what it gives is a number of the device")
        target = kwargs.get("device")
        if func is aten._to_copy.default and target is not None and torch.device(target) != GPU:
            self.read()
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and not args[0].is_meta:
            self.read()
            return args[0]
        compared = tensors[:1] if func in INDEXED else tensors
        if func not in COPIES and any(x.dim() > 0 and not x.is_meta for x in compared):
            raise RuntimeError(f"{func}: got tensors of both devices, {[tuple(x.shape) for x in tensors]}")
        return func(*args, **kwargs)


class _Lists(TorchFunctionMode):
    """``tolist``, which goes past the dispatcher."""

    def __init__(self, gpu: PretendedGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist and args[0].is_meta:
            self.gpu.read()
            return torch.zeros(args[0].shape, dtype=args[0].dtype).tolist()
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """Inside, the meta device is a GPU, but for autocast, which it has none of."""
    gpu, autocast, enabled = PretendedGPU(), torch.autocast, torch.is_autocast_enabled

    def autocast_elsewhere(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    def enabled_elsewhere(device_type: str) -> bool:
        return device_type != "meta" and enabled(device_type)

    with ExitStack() as stack:
        # Fused AdamW has a list of devices; this is none of them.
        stack.enter_context(patch("torch.optim.adam._device_dtype_check_for_fused", lambda *_: None))
        stack.enter_context(patch("torch.is_autocast_enabled", enabled_elsewhere))
        stack.enter_context(patch("torch.autocast", autocast_elsewhere))
        stack.enter_context(_Lists(gpu))
        stack.enter_context(gpu)
        yield gpu
