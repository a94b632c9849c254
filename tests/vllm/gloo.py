"""What NCCL does in vLLM's weight transfer, done by gloo, so that all the rest of it runs on a CPU.

Imported by a server (``--worker-extension-cls tests.vllm.gloo.Extension``) and by the trainer beside it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer import nccl_engine


class Group:
    """Of ``PyNcclCommunicator`` what the transfer uses."""

    def __init__(self, info: Any, rank: int):
        store = dist.TCPStore(info.master_address, info.master_port, info.world_size, is_master=rank == 0)
        self.group = dist.ProcessGroupGloo(store, rank, info.world_size, timedelta(seconds=60))

    def broadcast(self, tensor: Tensor, src: int, stream: None) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = src
        self.group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        """Gloo's ends with the process."""


class Extension:
    """vLLM makes this a base of its worker; all there is to it is that it is imported."""


nccl_engine.worker_init_process_group = lambda info, parallel: Group(info, parallel.rank + info.rank_offset)
nccl_engine.open_trainer_endpoint = lambda info: Group(info, 0)
torch.cuda.current_stream = lambda: None  # type: ignore[assignment, return-value]
