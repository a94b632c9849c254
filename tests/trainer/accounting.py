"""How many bytes of tensors are alive where, and how many were at the most in each phase of a step.

``accounting`` counts the storage behind every tensor that an operation makes, from then until it is freed, once however
many tensors share it; what an op of ``asyppo_kernels`` makes inside itself counts, too: ops take the way that they take
in training. What a kernel of torch's own takes for itself, below the dispatcher, is not seen.

Without a GPU the CPU stands in for it: memory that is asked for with ``pin_memory`` is the host's, all other the
device's. In the host's nothing is to be computed, only copied, and what has been moved away is not to be read; either
raises here. With ``accelerator="meta"``, inside ``pretended_gpu``, the meta device is the GPU.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from asyppo.run.progress import Timer

HOST, DEVICE = "host", "device"
OTHER = "other"
"""What has no name."""

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten.clone.default}
# Read no element of what they are given.
LIKE = {
    getattr(aten, name).default
    for name in ("empty_like", "zeros_like", "ones_like", "new_empty", "new_zeros", "new_empty_strided")
}


def local_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors with memory behind ``tensor``: itself, or what a subclass is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    parts = (getattr(tensor, name) for name in names)
    return [local for part in parts if isinstance(part, Tensor) for local in local_tensors(part)]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among ``values`` and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


class Storage:
    """One that is alive."""

    def __init__(self, bytes_: int, place: str):
        self.bytes, self.place, self.label, self.gone = bytes_, place, OTHER, False
        self.full = bytes_
        """Bytes when it is not moved away."""


class Accounts(TorchDispatchMode):
    """The books. ``alive`` and ``peak`` are in bytes, by place (``HOST``, ``DEVICE``)."""

    def __init__(self, accelerator: str = "cpu") -> None:
        super().__init__()
        self.accelerator = accelerator
        self.alive: Counter[str] = Counter()
        """Now, by place."""
        self.peak: dict[str, Counter[str]] = {}
        """The most that was alive, by phase and place; phases lie in each other, and each counts what was in it."""
        self.at_peak: dict[str, dict[str, Counter[str]]] = {}
        """What was alive then, by phase, place and label."""
        self.phases: list[str] = []
        """Those that have begun and not ended."""
        self._labelled: dict[str, Counter[str]] = {HOST: Counter(), DEVICE: Counter()}
        self._storages: dict[int, Storage] = {}
        self._references: dict[int, weakref.ref] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside is of this phase; one that comes again goes on."""
        self.phases.append(name)
        self._note()
        try:
            yield
        finally:
            self.phases.remove(name)

    def name(self, label: str, tensors: Iterable[Tensor]) -> None:
        """Count ``tensors``, and what will be views of them, under ``label``."""
        for tensor in tensors:
            for part in local_tensors(tensor):
                self._count(found := self._know(part), -1)
                found.label = label
                self._count(found, 1)

    def where(self, tensors: Iterable[Tensor]) -> Counter[str]:
        """Bytes of the storages of ``tensors`` by place; those that are moved away are nowhere."""
        found = {id(s): s for tensor in tensors for part in local_tensors(tensor) for s in [self._know(part)]}
        where: Counter[str] = Counter()
        for storage in found.values():
            where[storage.place] += storage.bytes
        return +where

    def refill(self) -> None:
        """Give memory, if not its contents, back to what is moved away: who prints it would end the process."""
        for key, known in list(self._storages.items()):
            if known.gone and (storage := self._references[key]()) is not None:
                storage.resize_(known.full)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, Tensor) and hasattr(t, "__tensor_flatten__") for t in types):
            return NotImplemented  # made of others, on which the operation comes here again
        kwargs = dict(kwargs or {})
        pinned = bool(kwargs.pop("pin_memory", False))
        inputs = [*_tensors(args), *_tensors(kwargs.values())]
        self._check(func, inputs)
        output = func(*args, **kwargs)
        for tensor in (*inputs, *_tensors((output,))):
            self._know(tensor, pinned)
        return output

    def _check(self, func: Any, inputs: list[Tensor]) -> None:
        if func.is_view or func in LIKE:
            return
        for tensor in inputs:
            known = self._storages.get(tensor.untyped_storage()._cdata)
            if known is not None and known.gone and tensor.numel():
                raise RuntimeError(f"{func}: got a tensor {list(tensor.shape)} that is moved away")
            if (
                known is not None
                and known.place == HOST
                and tensor.dim()
                and not tensor.is_meta  # no memory at all
                and func not in COPIES
                and not self._is_host()
            ):
                raise RuntimeError(f"{func}: got a tensor {list(tensor.shape)} in the host's memory")

    def _is_host(self) -> bool:
        """Whether the host computes, too, as it may where the device is another."""
        return self.accelerator != "cpu"

    def _know(self, tensor: Tensor, pinned: bool = False) -> Storage:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            place = HOST if pinned or tensor.device.type != self.accelerator else DEVICE
            self._storages[key] = found = Storage(storage.nbytes(), place)
            # Its object in Python lives as long as the storage itself.
            self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
            self._count(found, 1)
            self._note()
        elif (found := self._storages[key]).bytes != storage.nbytes():
            self._resized(found, storage.nbytes())
        return self._storages[key]

    def _resized(self, storage: Storage, size: int) -> None:
        self._count(storage, -1)
        storage.bytes, storage.gone = size, size == 0
        storage.full = size or storage.full
        self._count(storage, 1)
        self._note()

    def _forget(self, key: int) -> None:
        self._count(self._storages.pop(key), -1)
        del self._references[key]

    def _count(self, storage: Storage, sign: int) -> None:
        self.alive[storage.place] += sign * storage.bytes
        self._labelled[storage.place][storage.label] += sign * storage.bytes

    def _note(self) -> None:
        for phase in self.phases:
            peak = self.peak.setdefault(phase, Counter())
            for place in (HOST, DEVICE):
                if self.alive[place] > peak[place]:
                    peak[place] = self.alive[place]
                    self.at_peak.setdefault(phase, {})[place] = +self._labelled[place]


@contextmanager
def accounting(accelerator: str = "cpu") -> Iterator[Accounts]:
    """Inside, what is alive is counted, and the phases of a trainer's ``Timer`` are phases of the books."""
    accounts, resize, timed = Accounts(accelerator), torch.UntypedStorage.resize_, Timer.phase

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        if (known := accounts._storages.get(storage._cdata)) is not None:
            accounts._resized(known, size)
        return result

    @contextmanager
    def phase(timer: Timer, name: str) -> Iterator[None]:
        with timed(timer, name), accounts.phase(name):
            yield

    with ExitStack() as stack:
        stack.enter_context(patch.object(torch.UntypedStorage, "resize_", resized))
        stack.enter_context(patch.object(Timer, "phase", phase))
        # An op of ours goes its eager way, though this mode looks.
        stack.enter_context(patch("asyppo_kernels._registration._somebody_looks", lambda: False))
        stack.enter_context(accounts)
        try:
            yield accounts
        except BaseException:
            accounts.refill()
            raise
