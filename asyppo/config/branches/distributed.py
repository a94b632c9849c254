"""Settings below ``distributed``."""

from __future__ import annotations

from dataclasses import dataclass

from asyppo.config.setting import setting


@dataclass
class DistributedConfig:
    """Several processes, one a GPU, started by ``torchrun``; weights are sharded over them with FSDP2."""

    replicate: int = setting(1, at_least=1)
    """Copies of the sharded weights (HSDP): neighbouring ranks share a copy, and gradients are summed over the copies.
    The number of nodes keeps the gathering of weights within a node. 1: one copy over all ranks."""
    shard_single: bool = False
    """Wrap the models with FSDP2 in a single process, too. It shards nothing there; with bfloat16 compute it keeps the
    compute weights of one layer at a time instead of all of them."""
    timeout_s: int = setting(1800, at_least=1)
    """Seconds that a rank waits for the others before it ends the run with an error. Longer than the longest
    difference between ranks, which is that of their sampling and rewarding."""
