"""The books against what a few tensors come to by hand, and against torch's own profiler of the allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from asyppo.config import DistributedConfig
from asyppo.data.batch import micro_batches
from asyppo.distributed.processes import make_mesh, processes
from asyppo_kernels import linear_ppo_loss
from tests.trainer.accounting import DEVICE, HOST, OTHER, accounting
from tests.trainer.distributed_rank import policy

Make = Callable[..., Any]
MIB = 2**20


def floats(mib: int, **kw: Any) -> torch.Tensor:
    return torch.empty(mib * MIB // 4, **kw)


def test_a_storage_counts_once_from_when_it_is_made_until_it_is_freed() -> None:
    with accounting() as accounts:
        kept = floats(3)
        accounts.name("kept", [kept])
        with accounts.phase("first"):
            for _ in range(2):
                more = floats(2)
                view = more[1:].view(torch.int32)
                del more
                assert accounts.alive[DEVICE] == 5 * MIB
                del view
        with accounts.phase("second"):
            pinned = floats(1, pin_memory=True)
            pinned[:5].copy_(kept[:5])
            kept.untyped_storage().resize_(0)
            assert not accounts.where([kept])
            with pytest.raises(RuntimeError, match="that is moved away"):
                kept.sum()
            with pytest.raises(RuntimeError, match="in the host's memory"):
                pinned.sum()
            kept.untyped_storage().resize_(3 * MIB)
            assert accounts.where([kept, kept[2:], pinned]) == {DEVICE: 3 * MIB, HOST: MIB}
    assert accounts.peak == {"first": {DEVICE: 5 * MIB}, "second": {DEVICE: 3 * MIB, HOST: MIB}}
    assert accounts.at_peak["first"][DEVICE] == {"kept": 3 * MIB, OTHER: 2 * MIB}


def test_peaks_are_those_of_the_allocator() -> None:
    """What forward and backward of a head, in our own op, and of a layer of torch's take at the most."""
    width, vocabulary, rows = 64, 1000, 300
    layer, head = nn.Linear(width, width), nn.Linear(width, vocabulary, bias=False)
    x, target = torch.randn(rows, width), torch.randint(vocabulary, (rows,))
    ones = torch.ones(rows)

    def step() -> None:
        linear_ppo_loss(layer(x).relu(), head.weight, target, -ones, ones, ones / rows).loss.backward()
        layer.zero_grad()
        head.zero_grad()

    step()  # what is made once
    with accounting() as accounts, accounts.phase("step"):
        accounts.name("there", [*layer.parameters(), *head.parameters(), x, target, ones])
        before = accounts.alive[DEVICE]
        step()
    ours = accounts.peak["step"][DEVICE] - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    live = peak = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert ours == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize(
    ("dtype", "sharded"),
    [(torch.float32, False), (torch.bfloat16, False), pytest.param(torch.bfloat16, True, marks=pytest.mark.slow)],
)
def test_gradients_of_micro_batches_are_there_once(dtype: torch.dtype, sharded: bool, ragged_batch: Make) -> None:
    """In float32, and beside them no more than what a pass takes whatever came before it: copies of the weights in its
    precision, activations, gradients of a layer."""
    batch = ragged_batch(num_prompts=1, longest=3)  # few tokens, so that weights are most of it
    with processes(DistributedConfig(shard_single=sharded)):
        mesh = make_mesh(DistributedConfig(), torch.device("cpu"))
        with accounting() as accounts:
            model = policy(dtype, hidden_size=64, intermediate_size=512, num_hidden_layers=6)
            if mesh is not None:
                model.shard(mesh)
            micros = list(micro_batches(batch, torch.arange(1), 10_000)) * 3
            before = accounts.alive[DEVICE]
            for number, micro in enumerate(micros):
                with accounts.phase(str(number)):
                    model(micro).logprob.sum().backward()
            size = accounts.alive[DEVICE] - before
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            assert {g.dtype for g in gradients} == {torch.float32}
            assert size == pytest.approx(sum(p.numel() * 4 for p in model.parameters()), rel=0.01)
    casts = 0 if dtype == torch.float32 or sharded else size // 2
    beside = 0.6 if sharded else 0.45  # FSDP2 has buffers of further layers of the six
    for number in range(1, len(micros)):
        assert accounts.peak[str(number)][DEVICE] - before <= size + casts + beside * size
