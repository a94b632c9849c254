"""Weights and moments in the host's memory while nobody needs them: ``offload``.

What moves is the memory behind tensors, not the tensors: a storage on the device is emptied, its bytes in a pinned
buffer of the host, and filled again before it is read. So whatever refers to it goes on: views, shards of FSDP2,
optimizers. Bytes are copied, so results are those without. Copies run beside what is computed, on streams of their own.

Moments are on the device only while their optimizer steps, a lot at a time: one lot steps while the next one comes and
the one before leaves. So a step takes the memory of three lots beside weights and gradients, in place of all moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from asyppo.distributed.sharding import local, release
from asyppo.models.policy import WithoutAdapters

Level = Literal["none", "optimizer", "all"]

LOT_BYTES = 512 * 2**20
"""Of what moves together: a long copy for the bus, and little of the device's memory."""
SMALLEST = 16 * 2**10
"""Bytes of the smallest storage that moves: a launch for less is not worth it."""


def has_own_memory(device: torch.device) -> bool:
    """Return whether ``device`` has other memory than the host."""
    return device.type != "cpu"


class Lane:
    """Copies in one direction between host and device, on a stream of their own."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Any = None) -> Any:
        """Copy, of each pair, to the first from the second, once the current stream has done what it was given, and
        ``after`` that event; return the event of their end. What they use of the device may be freed meanwhile: it is
        not given away before."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                (target if target.is_cuda else source).record_stream(self.stream)
        return self.stream.record_event()


class Lot:
    """Storages that move together. They are on the device at first."""

    def __init__(self, storages: Sequence[torch.UntypedStorage], out: Lane, back: Lane):
        self.storages, self.sizes = storages, [s.nbytes() for s in storages]
        self.out, self.back = out, back
        self.host: Sequence[Tensor] = ()
        self.here = True
        self.sent: Any = None
        self.arrived: Any = None

    def send(self, *, changed: bool) -> None:
        """Move them to the host's memory. If they have not ``changed`` since they came from there they are only
        freed."""
        if not self.here:
            return
        self.wait()
        if not self.host:
            # One buffer for all: pinned memory comes in powers of two.
            self.host = torch.empty(sum(self.sizes), dtype=torch.uint8, pin_memory=True).split(self.sizes)
            changed = True
        if changed:
            self.sent = self.out.copy(zip(self.host, map(_bytes, self.storages), strict=True))
        for storage in self.storages:
            storage.resize_(0)
        self.here = False

    def fetch(self) -> None:
        """Begin to move them to the device."""
        if self.here:
            return
        for storage, size in zip(self.storages, self.sizes, strict=True):
            storage.resize_(size)
        pairs = zip(map(_bytes, self.storages), self.host, strict=True)
        self.arrived, self.here = self.back.copy(pairs, after=self.sent), True

    def wait(self) -> None:
        """Let what is computed from now on find them on the device."""
        if self.arrived is not None:
            self.arrived.wait()
            self.arrived = None


class Part:
    """Tensors that come and go together: weights of a model, or moments of some parameters."""

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], lanes: tuple[Lane, Lane], *, constant: bool = False):
        """``tensors`` finds them: there may be none at first, and others later. ``constant``: they keep their
        values."""
        self.tensors, self.lanes, self.constant = tensors, lanes, constant
        self.lots: list[Lot] = []

    def send(self) -> None:
        """Move them to the host's memory."""
        known = {s._cdata for lot in self.lots for s in lot.storages}
        found = {s._cdata: s for t in self.tensors() for s in _storages(t) if s.nbytes() >= SMALLEST}
        fresh = [s for key, s in found.items() if key not in known]
        self.lots += [Lot(own, *self.lanes) for own in _in_lots(fresh, lambda s: s.nbytes())]
        for lot in self.lots:
            lot.send(changed=not self.constant)

    def fetch(self) -> None:
        """Begin to move them to the device."""
        for lot in self.lots:
            lot.fetch()

    def wait(self) -> None:
        """Let what is computed from now on find them on the device."""
        for lot in self.lots:
            lot.wait()

    def finish_sending(self) -> None:
        """Wait, on the host, until what has been sent has freed its memory on the device."""
        for lot in self.lots:
            if lot.sent is not None:
                lot.sent.synchronize()

    def forget(self) -> None:
        """Give the host's memory back; all is on the device."""
        self.lots = []


class Moments(Part):
    """What an optimizer remembers of some parameters."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], lanes: tuple[Lane, Lane]):
        super().__init__(self._found, lanes)
        self.optimizer, self.parameters = optimizer, parameters

    def _found(self) -> Iterator[Tensor]:
        states = (self.optimizer.state.get(p, {}) for p in self.parameters)
        return (value for state in states for value in state.values() if isinstance(value, Tensor))


class Offload:
    """Moves the moments of ``optimizers`` (level ``optimizer``), the weights of ``models`` as well (``all``), or
    nothing (``none``, or on a CPU)."""

    def __init__(
        self,
        level: Level,
        device: torch.device,
        models: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
    ):
        self.weights: dict[nn.Module, list[Part]] = {}
        self.moments: dict[torch.optim.Optimizer, list[Moments]] = {}
        if level == "none" or not has_own_memory(device):
            return
        lanes = Lane(device), Lane(device)
        for optimizer in optimizers:
            every = [p for group in optimizer.param_groups for p in group["params"]]
            own = _in_lots(every, lambda p: 2 * local(p).nbytes)
            self.moments[optimizer] = [Moments(optimizer, parameters, lanes) for parameters in own]
        for model in models if level == "all" else ():
            trained, frozen = ([p for p in model.parameters() if p.requires_grad is kind] for kind in (True, False))
            kinds = {False: trained, True: frozen}
            self.weights[model] = [Part(partial(list, own), lanes, constant=kind) for kind, own in kinds.items()]

    def use(self, *models: Any) -> None:
        """From here on these ``models`` compute, others do not, and no optimizer steps before ``step``."""
        used = {model.policy if isinstance(model, WithoutAdapters) else model for model in models}
        away = [part for model, parts in self.weights.items() if model not in used for part in parts]
        here = [part for model, parts in self.weights.items() if model in used for part in parts]
        for model in self.weights.keys() - used:
            release(model)
        for part in (*away, *self._moments()):
            part.send()
        _bring(here)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer.step()``, which takes the gradients with it where moments move."""
        if optimizer not in self.moments:
            optimizer.step()
            return
        every = self.moments[optimizer]
        gradients = {p: p.grad for moments in every for p in moments.parameters}
        for parameter in gradients:
            parameter.grad = None
        due = [moments for moments in every if any(gradients[p] is not None for p in moments.parameters)]
        for number, moments in enumerate(due):
            if number > 1:
                due[number - 2].finish_sending()
            for coming in due[number : number + 2]:
                coming.fetch()
            moments.wait()
            for parameter in moments.parameters:
                parameter.grad = gradients.pop(parameter)
            optimizer.step()  # of no parameter without a gradient
            for parameter in moments.parameters:
                parameter.grad = None
            moments.send()

    def recall(self) -> None:
        """Bring everything to the device, for who reads it or puts other tensors in its place, until the next
        ``use``."""
        parts = [*(part for own in self.weights.values() for part in own), *self._moments()]
        _bring(parts)
        for part in parts:
            part.finish_sending()
            part.forget()

    def _moments(self) -> list[Moments]:
        return [moments for own in self.moments.values() for moments in own]


def _bring(parts: Sequence[Part]) -> None:
    for part in parts:
        part.fetch()
    for part in parts:
        part.wait()


def _in_lots(every: Sequence[Any], size: Callable[[Any], int]) -> list[list[Any]]:
    """Return neighbours together that come to ``LOT_BYTES`` at the most, or are one."""
    lots: list[list[Any]] = []
    room = 0
    for one in every:
        if size(one) > room or not lots:
            lots.append([])
            room = LOT_BYTES
        lots[-1].append(one)
        room -= size(one)
    return lots


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages behind a tensor, or behind what a subclass of it is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.untyped_storage()
        return
    for name in tensor.__tensor_flatten__()[0]:
        if isinstance(part := getattr(tensor, name), Tensor):
            yield from _storages(part)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
