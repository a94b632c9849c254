"""What a rank does of a step's work, with the number of ranks made up; real processes are in test_processes.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import asyppo.data.batch
import asyppo.distributed.processes
from asyppo.algorithm.options import PolicyLossOptions
from asyppo.algorithm.policy_losses import POLICY_LOSSES, PolicyTargets
from asyppo.config import AsyPPOConfig, ConfigError, DistributedConfig
from asyppo.data.batch import Batch, MicroBatch, empty_micro_batch, micro_batches, share_micro_batches, token_imbalance
from asyppo.distributed.processes import divide_rows, divided, forked_rng, make_mesh, own_part, processes
from asyppo.distributed.sharding import WholeCopy, between_replicas_once, clip_gradients, total_norms
from asyppo.models.critics import OneByOneCritics, StackedCritics
from asyppo.models.policy import Objective, Policy
from asyppo.rewards.computing import compute_rewards

Make = Callable[..., Any]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Make this process rank r of n, as far as nothing communicates."""

    def become(rank: int, size: int) -> None:
        for module in (asyppo.distributed.processes, asyppo.data.batch):
            monkeypatch.setattr(module, "rank", lambda: rank)
        monkeypatch.setattr(asyppo.distributed.processes, "world_size", lambda: size)

    return become


@settings(deadline=None)
@given(tokens=st.lists(st.integers(1, 50), min_size=0, max_size=30), size=st.integers(1, 5))
def test_rows_are_shared_evenly(tokens: list[int], size: int) -> None:
    rows = torch.arange(1, len(tokens) + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyppo.distributed.processes, "world_size", lambda: size)
        parts = divide_rows(rows, torch.tensor([0, *tokens]))
    assert len(parts) == size
    assert torch.equal(torch.cat(parts).sort().values, rows)
    assert all(torch.equal(part, part.sort().values) for part in parts)
    load = [sum(tokens[row - 1] for row in part.tolist()) for part in parts]
    # No row could move from the busiest rank to the idlest and leave the busiest less to do than that one then has.
    busiest = max(range(size), key=load.__getitem__)
    assert all(min(load) + tokens[row - 1] >= max(load) for row in parts[busiest].tolist())


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_groups_stay_whole(ranks: Make, size: int) -> None:
    keys = list("aaabbbbccdddddeeff")
    parts = []
    for rank in range(size):
        ranks(rank, size)
        parts.append(keys[own_part(keys)])
    assert [key for part in parts for key in part] == keys
    groups = [set(part) for part in parts]
    assert sum(map(len, groups)) == 6
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_reward_functions_see_whole_groups(ranks: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def sees(prompts: list[str], **_: Any) -> list[float]:
        seen.append(prompts)
        return [0.0] * len(prompts)

    ranks(0, 2)
    monkeypatch.setattr(asyppo.distributed.processes, "_gathered", lambda own: [own])
    # A row that is read from a file twice is two objects.
    compute_rewards([sees], [{"prompt": prompt} for prompt in "pqr" for _ in range(4)], ["a"] * 12, [[1]] * 12)
    assert seen == [list("pppp")]


def test_work_of_one_process_is_all_of_it() -> None:
    assert divided(lambda part: list("abc")[part], "xyz") == ["a", "b", "c"]


@pytest.mark.parametrize("size", [1, 2, 3, 20])
@pytest.mark.parametrize(("budget", "at_least"), [(10_000, 1), (25, 1), (25, 4)])
def test_ranks_take_equally_many_micro_batches(
    ranks: Make, ragged_batch: Make, size: int, budget: int, at_least: int
) -> None:
    batch: Batch = ragged_batch()
    rows = torch.arange(1, len(batch))
    of_ranks = []
    for rank in range(size):
        ranks(rank, size)
        of_ranks.append(list(micro_batches(batch, rows, budget, at_least)))
    assert len({len(of_rank) for of_rank in of_ranks}) == 1
    seen = torch.cat([micro.rows for of_rank in of_ranks for micro in of_rank])
    assert torch.equal(seen.sort().values, rows)
    cells = torch.zeros_like(batch.mask)
    for of_rank in of_ranks:
        for micro in of_rank:
            cells[micro.grid] = True
    assert torch.equal(cells[rows], batch.mask[rows])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_ranks_take_equally_many_micro_batches_of_the_critics_shares(
    ranks: Make, ragged_batch: Make, size: int, shared: bool
) -> None:
    batch: Batch = ragged_batch()
    shares = [torch.arange(0, 7), torch.arange(7, 12)]
    of_ranks = []
    for rank in range(size):
        ranks(rank, size)
        of_ranks.append(list(share_micro_batches(batch, shares, 40, shared=shared)))
    assert len({len(of_rank) for of_rank in of_ranks}) == 1
    for m, rows in enumerate(shares):
        seen = torch.cat([micros[m].rows for of_rank in of_ranks for micros in of_rank])
        assert torch.equal(seen.sort().values, rows)


def test_imbalance_is_the_busiest_rank_over_the_mean(ranks: Make, ragged_batch: Make) -> None:
    batch: Batch = ragged_batch()
    rows = torch.arange(len(batch))
    assert token_imbalance(batch, [rows]) == 1
    ranks(0, 2)
    one, other = rows[:1], rows[1:]  # a single row keeps one of the ranks idle
    ideal = float(batch.length.sum()) / 2
    parts = [float(batch.length[part].sum()) for part in divide_rows(other, batch.length)]
    got = token_imbalance(batch, [one, other])
    assert got == pytest.approx((float(batch.length[0]) + max(parts)) / ideal)
    assert got > 1


def zero_gradients(module: nn.Module) -> bool:
    """Every parameter has a gradient, and it is zero."""
    return all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("loss", list(POLICY_LOSSES))
def test_a_pass_over_nothing_reaches_every_weight(
    loss: str, tiny_lm: Make, tiny_critic: Make, ragged_batch: Make
) -> None:
    batch: Batch = ragged_batch()
    micro = empty_micro_batch(batch)
    none, nobody = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    targets = PolicyTargets(none, none, none, nobody, nobody)
    policy = Policy(tiny_lm())
    result = policy(micro, Objective(targets, PolicyLossOptions(entropy_coef=0.1), POLICY_LOSSES[loss]))
    result.loss.backward()
    assert result.loss == 0
    assert result.logprob.shape == (0,)
    assert zero_gradients(policy)
    critics = OneByOneCritics([tiny_critic()])
    critics(0, micro).sum().backward()
    assert zero_gradients(critics)
    stacked = StackedCritics([tiny_critic(1), tiny_critic(2)])
    values = stacked._on_shares(batch, [micro, micro])
    torch.stack([value.sum() for value in values]).sum().backward()
    assert zero_gradients(stacked)


def test_a_whole_copy_has_memory_only_while_it_is_filled(tiny_lm: Make) -> None:
    policy = Policy(tiny_lm(tie_word_embeddings=True))
    copy = WholeCopy(policy, torch.bfloat16, torch.device("cpu"))
    weights = dict(copy.module.named_parameters())

    def size() -> int:
        return sum(p.untyped_storage().size() for p in weights.values())

    want = {name: p.detach().clone() for name, p in policy.named_parameters()}
    assert size() == 0
    config = DistributedConfig(shard_single=True)
    with processes(config):
        policy.shard(make_mesh(config, torch.device("cpu")))
        with copy.of(policy):
            assert size() == 2 * sum(p.numel() for p in want.values())
            assert all(torch.equal(weights[name], value.to(torch.bfloat16)) for name, value in want.items())
            inner = copy.module.model
            assert inner.lm_head.weight is inner.model.embed_tokens.weight
        assert size() == 0


def test_gradient_norms_are_those_of_torch() -> None:
    def gradients() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(n, generator=generator) for n in (3, 1, 7)]

    ours, theirs = gradients(), [nn.Parameter(torch.zeros_like(g)) for g in gradients()]
    for parameter, gradient in zip(theirs, gradients(), strict=True):
        parameter.grad = gradient
    first, second = total_norms([ours, ours[:1]])
    want = nn.utils.clip_grad_norm_(theirs, 0.5)
    assert first == want
    assert second == ours[0].norm()
    clip_gradients(ours, 0.5, first)
    assert all(torch.equal(g, p.grad) for g, p in zip(ours, theirs, strict=True))


def test_a_critic_without_gradients_has_a_norm_on_their_device() -> None:
    assert total_norms([[torch.empty(3, device="meta")], []]).device.type == "meta"
    assert total_norms([[], []]).tolist() == [0, 0]


def test_random_numbers_of_other_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: seen.append(device))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: seen.append(device))
    before = torch.get_rng_state()
    with forked_rng():
        torch.rand(1)
    assert seen == [1, 1]
    assert torch.equal(torch.get_rng_state(), before)


def test_passes_keep_their_order_between_replicas() -> None:
    assert list(between_replicas_once(nn.Linear(1, 1), range(4))) == [0, 1, 2, 3]
    assert list(between_replicas_once(nn.Linear(1, 1), range(0))) == []


def test_replicas_that_do_not_divide_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def join(replicate: int) -> None:
        with processes(DistributedConfig(replicate=replicate)):
            pass

    with pytest.raises(ConfigError, match=r"distributed.replicate: got 2, needs a divisor of .* processes, 1"):
        join(2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"distributed.replicate: got 3, needs a divisor of .* processes, 8"):
        join(3)


@pytest.mark.parametrize("name", ["replicate", "timeout_s"])
def test_settings_are_checked(name: str) -> None:
    config = AsyPPOConfig(distributed=DistributedConfig(**{name: 0}))
    with pytest.raises(ConfigError, match=f"distributed.{name}: got 0, needs an integer of at least 1"):
        config.validate()


def test_ranks_hear_from_each_other(tmp_path: Path) -> None:
    script = Path(__file__).with_name("communication_rank.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    heard = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert heard[0].pop("own numbers") != heard[1].pop("own numbers")
    assert (heard[0].pop("called"), heard[1].pop("called")) == ([0], [])
    assert (heard[0].pop("agreed"), heard[1].pop("agreed")) == ("rank 0 is well", "rank 1 is well")
    assert heard[0] == heard[1]
    heard[0].pop("common numbers")
    assert heard[0] == {
        "mesh": [2, "shard"],
        "sum": [2.0, 1.0],
        "divided": ["0@0", "1@0", "2@1", "3@1", "4@1", "5@1", "6@1"],
        "few": ["0@1", "1@1", "2@1"],
        "none": [],
        "work fails": "rank 1 failed",
        "from main": "from 0",
        "main fails": "rank 0 failed",
        "one fails": "rank 1 failed",
    }


def test_one_process_has_no_mesh() -> None:
    with processes(DistributedConfig()):
        assert make_mesh(DistributedConfig(), torch.device("cpu")) is None


def test_micro_batches_of_one_process_are_not_empty(ragged_batch: Make) -> None:
    batch: Batch = ragged_batch()
    found: list[MicroBatch] = list(micro_batches(batch, torch.arange(len(batch)), 30))
    assert all(len(micro.rows) for micro in found)
