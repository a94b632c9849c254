"""Weights on their way to servers over NCCL, by vLLM's own weight transfer: nothing lies in a file or on the host.

The trainer and all workers of all servers are one NCCL group, in which the trainer has rank 0. vLLM's part for
trainers drives the transfer, through what here stands for its client: the servers' developer interface.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from asyppo.config import ConfigError
from asyppo.rollout.samplers.base import EngineError
from asyppo.rollout.samplers.vllm.server import Servers
from asyppo.rollout.samplers.vllm.weights import pieces

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine


class NCCLTransfer:
    """``Channel`` to servers that were started with ``--weight-transfer-config '{"backend": "nccl"}'``."""

    def __init__(self, servers: Servers, device: torch.device, dtype: torch.dtype, address: str | None = None):
        """Weights are sent from ``device`` in ``dtype``, that of the servers' model. ``address``: where those find this
        process; None: where it reaches the first of them from. Nothing is begun before the first ``write``."""
        self.servers, self.device, self.dtype, self.address = servers, device, dtype, address
        self.engine: NCCLTrainerWeightTransferEngine | None = None

    def write(self, weights: Iterator[tuple[str, Tensor]], wanted: Callable[[str], bool]) -> None:
        """Send those of ``weights`` that are ``wanted`` by name, a piece at a time; each is only good until the next.
        Raises ConfigError where vLLM is not in this environment, EngineError."""
        with self.servers.paused():
            for piece in pieces(weights, wanted, self.device, self.dtype):
                self.servers.within_timeout(partial(self._send, piece))

    def load(self, load: Callable[[Path], None]) -> None:
        """Servers have them by now."""

    def clear(self) -> None:
        """They take no memory on the way but that of a piece."""

    def _send(self, piece: dict[str, Tensor]) -> None:
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device.index or 0)  # of this thread
        source = _Piece(piece)
        try:
            if self.engine is None:
                self.engine = self._begin(source)
            self.engine.source = source
            self.engine.send_weights()
        except (ConfigError, EngineError):
            raise
        except Exception as error:  # whatever NCCL and vLLM may raise
            what = " ".join(str(error).split()) or type(error).__name__
            raise EngineError(f"weights could not be sent to vLLM over NCCL: {what}") from error

    def _begin(self, source: _Piece) -> NCCLTrainerWeightTransferEngine:
        try:
            from vllm.distributed.weight_transfer.nccl_engine import (
                NCCLTrainerInitInfo,
                NCCLTrainerWeightTransferEngine,
            )
        except ImportError as error:
            raise ConfigError(
                f"vllm.weight_transfer: got nccl, needs a vLLM that has it in the trainer's environment ({error}); "
                "directory does without"
            ) from error
        client = _Client(self.servers)
        address = self.address or _own_address(self.servers.urls[0])
        info = NCCLTrainerInitInfo(
            address,
            _free_port(),
            1 + sum(client.world_sizes),
            packed=False,  # packing takes two buffers of a gibibyte on either side
            rank=0,
        )
        return NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)


class _Piece:
    """vLLM's ``WeightSource`` of some weights."""

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = weights

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights.items())


class _Client:
    """vLLM's ``VLLMWeightSyncClient`` of several servers."""

    def __init__(self, servers: Servers):
        self.servers = servers
        self.world_sizes = [servers.call(url, "/get_world_size", method="GET")["world_size"] for url in servers.urls]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The workers of the servers have ranks one after another."""
        first = dict(zip(self.servers.urls, _sums(init_info["rank_offset"], self.world_sizes), strict=True))
        self.servers.each(
            lambda url: self.servers.call(
                url, "/init_weight_transfer_engine", {"init_info": init_info | {"rank_offset": first[url]}}
            )
        )

    def start_weight_update(self) -> None:
        self.servers.everywhere("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.servers.everywhere("/update_weights", {"update_info": update_info})

    def finish_weight_update(self) -> None:
        self.servers.everywhere("/finish_weight_update")


def _sums(first: int, counts: list[int]) -> list[int]:
    """What comes before each."""
    return [first + sum(counts[:i]) for i in range(len(counts))]


def _own_address(url: str) -> str:
    """The address of this machine on the way to ``url``."""
    parts = urlsplit(url)
    with socket.create_connection(
        (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    ) as way:
        return str(way.getsockname()[0])


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])
