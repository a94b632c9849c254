"""Weights on their way to vLLM: a model's directory in shared memory, filled piece by piece."""

from __future__ import annotations

import copy
import fcntl
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from asyppo.models.adapters import plain_names

PREFIX = "asyppo-weights-"
PIECE_BYTES = 2**30
"""Of one file, about."""


def path_of(name: str, place: str | None = None) -> Path:
    """Return where the directory of weights called ``name`` is: in ``place``, or else in memory, if the system has a
    file system there."""
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    return (memory if place is None else Path(place).expanduser()) / f"{PREFIX}{name}"


def together(name: str) -> str:
    """Return what stands for the weights that have to be sent together with the one of this ``name``: its layer, since
    vLLM makes one weight of several of a layer's, and fills what is missing of it with anything."""
    layer = re.match(r".*?\.\d+\.", name)
    return layer[0] if layer else name


def changing(model: PreTrainedModel) -> frozenset[str]:
    """Return what the weights that training changes, and those that are sent with them, are ``together`` under."""
    plain = plain_names(model)
    parameters = model.named_parameters(remove_duplicate=False)
    return frozenset(together(plain[name]) for name, parameter in parameters if parameter.requires_grad)


def pieces(
    weights: Iterator[tuple[str, Tensor]], wanted: Callable[[str], bool], device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Tensor]]:
    """Copy those of ``weights`` that are ``wanted`` by name, each of which is only good until the next, to a device:
    ``PIECE_BYTES`` at a time, and what has to be sent together in one piece."""
    piece: dict[str, Tensor] = {}
    size, last = 0, ""
    for name, weight in weights:
        if not wanted(name):
            continue
        if size >= PIECE_BYTES and together(name) != last:
            yield piece
            piece, size = {}, 0
        last = together(name)
        piece[name] = weight.detach().to(device, dtype, copy=True).contiguous()
        size += piece[name].nbytes
    if piece:
        yield piece


class WeightDirectory:
    """A directory that vLLM can start on and take weights from, gone with this process.

    Its name is locked as long as this process lives; those whose owners were killed are removed by the next one.
    """

    def __init__(self, path: Path, config: PreTrainedConfig, architecture: str, dtype: torch.dtype):
        """Nothing is made before the first ``write``. ``path``: see ``path_of``; for weights in ``dtype`` of a model
        with this ``config``, of the class ``architecture``."""
        self.path, self.dtype = path, dtype
        self.config = copy.deepcopy(config)
        self.config.architectures, self.config.dtype = [architecture], dtype
        self.made = False

    def _make(self) -> None:
        _sweep(self.path.parent)
        partial = self.path.with_name(f".{self.path.name}")
        partial.mkdir(mode=0o700)
        self._lock = os.open(partial / "lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.config.save_pretrained(partial)
        partial.rename(self.path)
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        self.made = True

    def write(self, weights: Iterator[tuple[str, Tensor]], wanted: Callable[[str], bool]) -> None:
        """Write those of ``weights`` that are ``wanted`` by name; each is only good until the next."""
        if not self.made:
            self._make()
        self.clear()
        for number, piece in enumerate(pieces(weights, wanted, torch.device("cpu"), self.dtype)):
            save_file(piece, self.path / f"model-{number:05d}.safetensors", metadata={"format": "pt"})

    def load(self, load: Callable[[Path], None]) -> None:
        """Let an engine's ``load`` take what was written. Raises EngineError."""
        load(self.path)

    def clear(self) -> None:
        """Delete the weights, whose memory they take."""
        for path in self.path.glob("*.safetensors"):
            path.unlink()


def _sweep(place: Path) -> None:
    for path in place.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another's, or gone meanwhile
            lock = os.open(path / "lock", os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
