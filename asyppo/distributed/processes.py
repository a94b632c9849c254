"""Several processes, started by ``torchrun``, and what each of them does.

Every rank holds the whole batch, so the batch's statistics (token weights, whitening, masks, metrics) are those of the
global batch without communication, and the same on every rank. What ranks divide is

- sampling and rewarding, in whole groups: ``divided``;
- forward and backward passes, in rows balanced by tokens: ``divide_rows``, which become micro-batches;
  what a rank computes reaches the others by ``sum_over_ranks``;
- weights, gradients and optimizer state: ``asyppo.distributed.sharding``.

A single process is the same program: every part is the whole there, and every sum the value itself.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from asyppo.config import AsyPPOConfig, ConfigError, DistributedConfig

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_rank() -> int:
    """Return the number of this process on its node, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Return whether this is rank 0, before and after the processes have joined, too."""
    return os.environ.get("RANK", "0") == "0"


def restarted(config: AsyPPOConfig) -> AsyPPOConfig:
    """Return ``config`` for a run that ``torchrun --max-restarts`` may start again, in which case it is to go on from
    its last checkpoint. Raises ConfigError if the run has no name to find it by."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and config.run_name is None:
        raise ConfigError(
            "run_name: got None, needs a name where torchrun --max-restarts may start the run again, to find its "
            "checkpoints by"
        )
    return replace(config, resume=config.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)


@contextmanager
def processes(config: DistributedConfig) -> Iterator[None]:
    """Join the other processes that ``torchrun`` started, for the time inside. Without it there is nothing to join;
    ``shard_single`` makes a group of one.

    Raises ConfigError where ``replicate`` does not divide the number of processes.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    size = int(os.environ["WORLD_SIZE"]) if launched else 1
    if size % config.replicate:
        raise ConfigError(
            f"distributed.replicate: got {config.replicate}, needs a divisor of the number of processes, {size}"
        )
    if not launched and not config.shard_single:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    # Two backends: what is not a tensor of the GPU travels between CPUs.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=config.timeout_s)
    store: dist.Store = dist.HashStore()
    if launched:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        # torchrun may keep the store when it starts everything again, and with it the addresses of dead processes.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    rank = int(os.environ["RANK"]) if launched else 0
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    try:
        yield
        dist.barrier()  # none leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process, which ``torchrun`` started.

    At once, with the output flushed: models and process groups that refer to each other are destroyed in any order
    when the interpreter ends, and threads of gloo and NCCL then wait for what is gone. A failure is held back for
    three seconds: where it is that another rank has died, torchrun sees that one first, names it and ends this one.
    """
    if status:
        time.sleep(3)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def make_mesh(config: DistributedConfig, device: torch.device) -> DeviceMesh | None:
    """Return the mesh to shard models over, of all ranks: [shard], or, where ``config`` asks for replicas,
    [replicate, shard] with neighbouring ranks in one shard group; None in a process on its own."""
    if not dist.is_initialized():
        return None
    if config.replicate == 1:
        return init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    shape = (config.replicate, world_size() // config.replicate)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def sum_over_ranks(value: Tensor, *, in_place: bool = False) -> Tensor:
    """Return ``value`` summed over all ranks; the same on each. With one process, or ``in_place``, it is ``value``
    itself."""
    if world_size() > 1:
        value = value if in_place else value.clone()
        dist.all_reduce(value)
    return value


def from_main(make: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Return on every rank what ``make`` returns on rank 0, the only one that calls it; an error there is raised on
    every rank. ``group``, of all ranks, is for another thread than the main one."""
    if world_size() == 1:
        return make()
    outcome: list[Any] = [_outcome(make) if rank() == 0 else None]
    dist.broadcast_object_list(outcome, group=group)
    return _result(outcome[0])


def agreed(make: Callable[[], T]) -> T:
    """Return what ``make`` returns on this rank; an error on one rank is raised on every rank."""
    if world_size() == 1:
        return make()
    own = _outcome(make)
    for other in _gathered(own if isinstance(own, Exception) else None):
        _result(other)
    return _result(own)


def first_of_ranks(value: T | None) -> T | None:
    """Return on every rank the first ``value`` of any rank that is not None; None if there is none."""
    everyone = [value] if world_size() == 1 else _gathered(value)
    return next((one for one in everyone if one is not None), None)


def divided(work: Callable[[slice], list[T]], keys: Sequence[Any]) -> list[T]:
    """Do on each rank its own part of a piece of work, and return all results in order.

    ``work`` takes a part of the items as a slice and returns one result for each. Parts have about the same number of
    items; neighbours with equal ``keys``, one an item, such as those of a group, stay together. A rank without a part
    does nothing. An error on one rank is raised on every rank.
    """
    if world_size() == 1:
        return work(slice(0, len(keys)))
    part = own_part(keys)
    outcomes = _gathered(_outcome(lambda: work(part)) if part.stop > part.start else [])
    return [result for outcome in outcomes for result in _result(outcome)]


def own_part(keys: Sequence[Any]) -> slice:
    """Return the part of the items with these ``keys`` that this rank works on."""
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]] + [len(keys)]
    groups, size = len(starts) - 1, world_size()
    return slice(starts[groups * rank() // size], starts[groups * (rank() + 1) // size])


def _gathered(own: T) -> list[T]:
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, own)
    everyone[rank()] = own  # an error with its traceback
    return everyone


def _outcome(make: Callable[[], T]) -> T | Exception:
    try:
        return make()
    except Exception as error:
        return error


def _result(outcome: T | Exception) -> T:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def divide_rows(rows: Tensor, tokens: Tensor) -> list[Tensor]:
    """Divide ``rows`` (int64 [b]) among the ranks so that each has about the same number of ``tokens`` (int64 [B], of
    each row of the batch), and return the rows of every rank, in their order.

    The longest row first, each to the rank with the fewest tokens so far: at most a third above the best division
    (R. L. Graham, Bounds on multiprocessing timing anomalies, 1969).
    """
    if world_size() == 1:
        return [rows]
    row_tokens = tokens[rows].tolist()
    load = [0] * world_size()
    owner = torch.empty(len(rows), dtype=torch.int64)
    for i in sorted(range(len(row_tokens)), key=row_tokens.__getitem__, reverse=True):
        least = load.index(min(load))
        load[least] += row_tokens[i]
        owner[i] = least
    owner = owner.to(rows.device)
    return [rows[owner == r] for r in range(world_size())]


@contextmanager
def forked_rng() -> Iterator[None]:
    """Put torch's global generators back afterwards: the CPU's, and that of this process's own GPU. Of itself
    ``fork_rng`` takes all the GPUs of a machine, and memory on each."""
    own = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=own):
        yield


@contextmanager
def own_randomness() -> Iterator[None]:
    """Let ranks draw different numbers from torch's global generators, which go on afterwards as one, in step.

    With one process nothing is changed. Samples thus depend on the number of ranks, and on the seed.
    """
    if world_size() == 1:
        yield
        return
    seed = int(torch.randint(2**62, ()))
    with forked_rng():
        torch.manual_seed(seed + rank())
        yield
