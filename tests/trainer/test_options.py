"""The algorithm's options in the loop: each does what it says, by hand-computed numbers where they are short."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import asyppo.trainer
from asyppo.algorithm.advantage import (
    coarse,
    critics_advantage,
    group_advantage,
    length_adaptive_lambda,
    without_own_critic,
)
from asyppo.algorithm.ops import FUSED
from asyppo.algorithm.options import AdvantageOptions, ShapingOptions
from asyppo.algorithm.shaping import shape_rewards
from asyppo.algorithm.signal import LearningSignal, Outcome
from asyppo.algorithm.weights import token_weights
from asyppo.config import AsyPPOConfig, ConfigError, CriticConfig
from asyppo.data.batch import Batch, make_batch, micro_batches
from asyppo.models.critics import StackedCritics
from asyppo.models.policy import Policy

Make = Callable[..., Any]


def likes_a(completions: list[str], **_: Any) -> list[float]:
    """Share of a's."""
    return [c.count("a") / max(len(c), 1) for c in completions]


def everything(batch: Batch) -> Any:
    """The whole batch as micro-batches."""
    return micro_batches(batch, torch.arange(len(batch)), 10_000)


def generator() -> torch.Generator:
    """A new one, always the same."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments and result of every advantage computation of the trainer."""
    seen: list[dict[str, Any]] = []

    advantage_of = asyppo.trainer.advantage_of

    def spied(config: AsyPPOConfig) -> Any:
        def call(outcome: Outcome, options: AdvantageOptions) -> LearningSignal:
            result = advantage_of(config)(outcome, options)
            seen.append({"outcome": outcome, "result": result})
            return result

        return call

    monkeypatch.setattr(asyppo.trainer, "advantage_of", spied)
    return seen


def group_signal(batch: Batch, **options: Any) -> LearningSignal:
    """GRPO's signal of a batch."""
    outcome = Outcome(batch.reward, batch.mask, batch.learned, batch.group)
    return group_advantage(outcome, AdvantageOptions(**options))


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Options and result of every call of the policy's loss."""
    seen: list[dict[str, Any]] = []
    op = FUSED.linear_ppo_loss

    def spy(*arguments: Any, **options: Any) -> Any:
        result = op(*arguments, **options)
        seen.append({**options, "token_weight": arguments[5], "result": result})
        return result

    monkeypatch.setattr(Policy, "ops", replace(FUSED, linear_ppo_loss=spy))
    return seen


# --- critics ---


def test_value_clipping_is_against_the_values_before_the_update(
    tiny_config: Make, tiny_trainer: Make, ragged_batch: Make
) -> None:
    batch: Batch = ragged_batch()
    share, clip = torch.arange(len(batch)) % 2, 0.05
    once = tiny_trainer(tiny_config(), likes_a)
    before = once.critics.values(batch, 1_000)
    first = once.update_critics(batch, share, generator())
    moved = once.critics.values(batch, 1_000)
    assert ((moved - before).abs() > clip).any()
    trainer = tiny_trainer(tiny_config(critic={"num_iterations": 2, "cliprange_value": clip}), likes_a)
    row = trainer.update_critics(batch, share, generator())
    returns = batch.reward.sum(dim=1, keepdim=True)
    for m in range(2):
        weight = token_weights(batch.mask, (share == m).nonzero().squeeze(1), "token-mean")
        clipped = before[m] + (moved[m] - before[m]).clamp(-clip, clip)
        plain = float((weight * (moved[m] - returns).square()).sum())
        second = float((weight * torch.maximum((moved[m] - returns).square(), (clipped - returns).square())).sum())
        assert second > plain + 1e-3
        assert row[f"critic/{m}/vf_loss"] == pytest.approx((first[f"critic/{m}/vf_loss"] + second) / 2, rel=1e-4)


@pytest.mark.parametrize("stacked", [True, False])
def test_every_critic_learns_from_all_responses_by_hand(stacked: bool, tiny_config: Make, tiny_trainer: Make) -> None:
    """One response of two tokens, rewarded by 1: each critic learns λ-returns that bootstrap on its own values."""
    config = tiny_config(critic={"share": "all", "num_critics": 3, "value_lambda": 0.5, "stacked": stacked}, gamma=0.8)
    trainer = tiny_trainer(config, likes_a)
    batch = make_batch(
        [torch.tensor([3, 4])],
        [torch.tensor([5, 1])],
        [torch.zeros(2)],
        [1.0],
        [False],
        [0],
        pad_token_id=0,
        device=torch.device("cpu"),
    )
    before = trainer.critics.values(batch, 1_000)[:, 0].tolist()
    assert len({round(first, 3) for first, _ in before}) == 3
    row = trainer.update_critics(batch, None, generator())
    for m, (first, second) in enumerate(before):
        # δ_1 = r - V(s_1), and A_0 = δ_0 + γ λ δ_1 with δ_0 = γ V(s_1) - V(s_0).
        returns = [0.8 * second + 0.8 * 0.5 * (1 - second), 1.0]
        assert row[f"critic/{m}/vf_loss"] == pytest.approx(
            ((first - returns[0]) ** 2 + (second - returns[1]) ** 2) / 2, rel=1e-4
        )
    after = trainer.critics.values(batch, 1_000)[:, 0]
    assert bool(((after - torch.tensor(before)).abs() > 1e-4).all())


@pytest.mark.parametrize("stacked", [True, False])
def test_critics_that_start_alike_stay_alike_on_all_responses(
    stacked: bool, tiny_config: Make, tiny_trainer: Make, signals: list
) -> None:
    """Only what they learn from tells such critics apart: on shares they come to differ, on all responses not."""
    spread = {}
    for share in ("disjoint", "all"):
        config = tiny_config(run_name=share, critic={"share": share, "stacked": stacked})
        trainer = tiny_trainer(config, likes_a)
        with torch.no_grad():
            for p, q in zip(*(model.parameters() for model in trainer.critics.models), strict=True):
                q.copy_(p)
        row = trainer.step(1).metrics
        assert (row["critic/0/vf_loss"] == pytest.approx(row["critic/1/vf_loss"])) == (share == "all")
        spread[share] = float(signals[-1]["result"].std.max())
    assert spread["all"] < 1e-5 < 1e-3 < spread["disjoint"]


def test_advantages_from_values_before_the_update(tiny_config: Make, tiny_trainer: Make, signals: list) -> None:
    seen = {}
    for choice in ("after", "before"):
        config = tiny_config(advantage_values=choice, run_name=choice)
        trainer = tiny_trainer(config, likes_a)
        critics = copy.deepcopy(trainer.critics)
        batches: list[Batch] = []
        original = trainer.update_critics
        trainer.update_critics = lambda batch, *a, to=original, into=batches: (into.append(batch), to(batch, *a))[1]
        trainer.step(1)
        of_start, of_end = (c.values(batches[0], 1_000) for c in (critics, trainer.critics))
        assert not torch.allclose(of_start, of_end, atol=1e-3)
        seen[choice] = signals[-1]["outcome"].values
        torch.testing.assert_close(seen[choice], of_start if choice == "before" else of_end)


def test_cross_fitting_by_hand() -> None:
    value = torch.tensor([[[1.0, 2.0], [4.0, 0.0]], [[3.0, 6.0], [8.0, 0.0]], [[5.0, 1.0], [0.0, 0.0]]])
    trained_by = torch.tensor([0, 2])
    # Row 0: mean of critics 1 and 2; row 1: of critics 0 and 1.
    assert without_own_critic(value, trained_by).mean(dim=0).tolist() == [[4.0, 3.5], [6.0, 0.0]]
    mask = torch.tensor([[True, True], [True, False]])
    reward, group = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 0])
    options = AdvantageOptions(
        lam=0.0,
        whiten="none",
        advantage_values="cross_fit",
        advantage_mask_fraction=0.0,
        entropy_filter_fraction=0.0,
    )
    out = critics_advantage(Outcome(reward, mask, mask, group, value, trained_by), options)
    assert out.value.tolist() == [[4.0, 3.5], [6.0, 0.0]]
    assert out.raw_advantage.tolist() == [[3.5 - 4.0, 1 - 3.5], [2.0 - 6.0, 0.0]]
    assert out.returns.tolist() == [[1.0, 1.0], [2.0, 0.0]]
    torch.testing.assert_close(out.std, torch.where(mask, value.std(dim=0, correction=0), 0.0))


def test_cross_fitting_in_the_loop(tiny_config: Make, tiny_trainer: Make, signals: list) -> None:
    config = tiny_config(advantage_values="cross_fit")
    trainer = tiny_trainer(config, likes_a)
    shares = []
    original = trainer.update_critics
    trainer.update_critics = lambda batch, share, *a: (shares.append(share), original(batch, share, *a))[1]
    trainer.step(1)
    value, signal = signals[0]["outcome"].values, signals[0]["result"]
    for row, own in enumerate(shares[0].tolist()):
        torch.testing.assert_close(signal.value[row], value[1 - own, row])  # of two critics, the other one


def test_critics_have_a_schedule_of_their_own(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config(
        max_steps=4, lr_scheduler_type="linear", critic={"lr_scheduler_type": "cosine", "warmup_steps": 1}
    )
    trainer = tiny_trainer(config, likes_a)
    rows = [trainer.step(step).metrics for step in range(1, 5)]
    # The policy's first of three steps is the second.
    assert [row.get("actor/lr") for row in rows] == [None, *(pytest.approx(1e-2 * f) for f in (1, 2 / 3, 1 / 3))]
    expected = [0.5e-2 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert [row["critic/lr"] for row in rows] == pytest.approx(expected)
    rates = [o.param_groups[0]["lr"] for o in (trainer.policy_optimizer, trainer.critic_optimizer.adamw)]
    assert rates == pytest.approx([1e-2 / 3, expected[-1]])


# --- rewards ---


def test_kl_in_the_reward_by_hand(tiny_config: Make, ragged_batch: Make) -> None:
    batch: Batch = ragged_batch()
    old = torch.where(batch.mask, -torch.rand_like(batch.reward), 0.0)
    ref = torch.where(batch.mask, old - 0.5, math.nan)
    ref[0, 0] = old[0, 0] + 2
    options = ShapingOptions.of(tiny_config(beta=0.1, use_kl_in_reward=True))
    shaped, row = shape_rewards(batch.reward, batch.mask, old, ref, options)
    expected = batch.reward - 0.05 * batch.mask
    expected[0, 0] += 0.05 + 0.2
    torch.testing.assert_close(shaped, expected)
    tokens = int(batch.mask.sum())
    assert row["actor/reward_kl_penalty"] == pytest.approx((0.5 * (tokens - 1) - 2) / tokens)


@pytest.mark.parametrize("algorithm", ["asyppo", "grpo"])
def test_kl_in_the_reward_in_the_loop(
    tiny_config: Make, tiny_trainer: Make, signals: list, losses: list, algorithm: Any
) -> None:
    config = tiny_config(algorithm=algorithm, beta=0.5, use_kl_in_reward=True)
    trainer = tiny_trainer(config, likes_a)
    first, second = (trainer.step(step).metrics for step in (1, 2))
    assert first["actor/reward_kl_penalty"] == 0
    assert abs(second["actor/reward_kl_penalty"]) > 1e-4
    # Both critics and advantages see it; the score stays the reward functions'.
    reward = signals[1]["outcome"].reward
    assert float(reward.sum(dim=1).mean()) == pytest.approx(second["critic/rewards/mean"], abs=1e-6)
    assert second["critic/rewards/mean"] != pytest.approx(second["critic/score/mean"], abs=1e-4)
    assert all(call["kl_coef"] == 0 and call["ref_logprob"] is None for call in losses)
    assert "actor/kl_loss" not in second


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_there_is_a_reference_only_where_it_is_used(tiny_config: Make, tiny_trainer: Make, beta: float) -> None:
    assert (tiny_trainer(tiny_config(beta=beta), likes_a).reference is not None) == (beta > 0)


def test_soft_overlong_punishment_by_hand(tiny_config: Make, ragged_batch: Make) -> None:
    batch: Batch = ragged_batch(longest=6)
    config = tiny_config(max_completion_length=6, overlong_buffer_len=4, overlong_penalty_factor=0.8)
    shaped, row = shape_rewards(batch.reward, batch.mask, batch.reward, None, ShapingOptions.of(config))
    penalty = {1: 0.0, 2: 0.0, 3: 0.2, 4: 0.4, 5: 0.6, 6: 0.8}
    expected = [penalty[n] for n in batch.response_length.tolist()]
    assert len(set(expected)) > 3
    for b, length in enumerate(batch.response_length.tolist()):
        difference = (batch.reward - shaped)[b]
        assert float(difference[length - 1]) == pytest.approx(expected[b], abs=1e-6)
        assert float(difference.abs().sum()) == pytest.approx(expected[b], abs=1e-6)
    assert row["critic/overlong_penalty/mean"] == pytest.approx(sum(expected) / len(expected))


def test_soft_overlong_punishment_in_the_loop(tiny_config: Make, tiny_trainer: Make, scripted_sampler: Make) -> None:
    config = tiny_config(overlong_buffer_len=2)
    trainer = tiny_trainer(config, likes_a, sampler=scripted_sampler([[3, 3, 3, 1], [3, 3, 1]]))
    row = trainer.step(1).metrics
    assert (row["critic/score/mean"], row["critic/rewards/mean"]) == (1.0, 0.75)


# --- which tokens, and how much ---


@pytest.mark.parametrize("algorithm", ["asyppo", "grpo"])
def test_truncated_responses_weigh_nothing(
    tiny_config: Make, tiny_trainer: Make, scripted_sampler: Make, losses: list, signals: list, algorithm: Any
) -> None:
    """Responses of 2 and 3 tokens end, the one of 5 tokens does not."""
    script = [[3, 1], [4, 5, 6, 7, 8], [3, 5, 1]]
    config = tiny_config(algorithm=algorithm, mask_truncated_completions=True, num_generations=3, entropy_coef=0.1)
    trainer = tiny_trainer(config, likes_a, sampler=scripted_sampler(script))
    seen: list[Batch] = []
    if algorithm == "asyppo":
        original = trainer.update_critics
        trainer.update_critics = lambda batch, *a: (seen.append(batch), original(batch, *a))[1]
    row = trainer.step(1).metrics
    weights = torch.cat([call["token_weight"] for call in losses]).tolist()
    # Nine responses in all, three of each kind: 1/9 of a response, spread over its tokens.
    counted = sorted(w for w in weights if w)
    assert counted == pytest.approx([1 / 27] * 9 + [1 / 18] * 6)
    assert weights.count(0.0) == 15
    signal = signals[0]["result"]
    truncated = [1, 4, 7]
    assert not signal.advantage_keep[truncated].any()
    assert not signal.entropy_keep[truncated].any()
    assert row["response_length/clip_ratio"] == pytest.approx(1 / 3)
    if algorithm == "asyppo":
        chosen = signal.advantage[seen[0].learned]
        assert len(chosen) == 15
        assert float(chosen.mean()) == pytest.approx(0, abs=1e-5)  # whitened over the tokens that count
        assert float(chosen.square().mean()) == pytest.approx(1, abs=1e-3)


def test_critics_do_not_learn_from_ignored_responses(tiny_config: Make, tiny_trainer: Make, ragged_batch: Make) -> None:
    batch: Batch = ragged_batch()
    share = torch.arange(len(batch)) % 2
    ignored = torch.arange(len(batch)) % 3 == 0
    batch = replace(batch, ignored=ignored)
    other = replace(batch, reward=torch.where(ignored[:, None], 100.0, batch.reward))
    rows = [tiny_trainer(tiny_config(), likes_a).update_critics(b, share, generator()) for b in (batch, other)]
    assert rows[0] == rows[1]
    seen = tiny_trainer(tiny_config(), likes_a).update_critics(replace(other, ignored=~ignored), share, generator())
    assert seen["critic/vf_loss"] > 1000


def test_a_batch_of_truncated_responses_only(tiny_config: Make, tiny_trainer: Make, scripted_sampler: Make) -> None:
    config = tiny_config(mask_truncated_completions=True)
    trainer = tiny_trainer(config, likes_a, sampler=scripted_sampler([[3, 4, 5, 6, 7]]))
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    row = trainer.step(1).metrics
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True))
    assert row["actor/skipped_updates"] == row["critic/skipped_updates"] == 0
    assert row["actor/loss"] == 0


def test_dual_clip_bounds_the_ratio_where_the_advantage_is_negative(
    tiny_config: Make, tiny_trainer: Make, ragged_batch: Make, losses: list
) -> None:
    batch: Batch = ragged_batch()
    signal = replace(group_signal(batch), advantage=torch.full_like(batch.reward, -1.0))
    rows = []
    for delta in (None, 3.0):
        trainer = tiny_trainer(tiny_config(delta=delta, entropy_coef=0.0), likes_a)
        logprob, _ = trainer.policy.logprobs(batch, everything(batch))
        rows.append(trainer.update_policy(batch, signal, logprob - math.log(5), None, generator()).metrics)
    assert [call["dual_clip"] for call in losses] == [None, 3.0]
    assert [row["actor/pg_loss"] for row in rows] == pytest.approx([5.0, 3.0], rel=1e-4)
    assert [row["actor/pg_clipfrac"] for row in rows] == [0, 0]
    assert [row["actor/pg_clipfrac_lower"] for row in rows] == [0, 1]


def test_truncated_importance_sampling(tiny_config: Make, tiny_trainer: Make, ragged_batch: Make, losses: list) -> None:
    batch: Batch = ragged_batch()
    signal = replace(group_signal(batch), advantage=torch.ones_like(batch.reward))
    trainer = tiny_trainer(tiny_config(importance_sampling_clip_max=2.0, entropy_coef=0.0), likes_a)
    old, _ = trainer.policy.logprobs(batch, everything(batch))
    # The trainer's probability is half the sampler's, and 1.5 and 4 times it at one token each.
    gap = torch.full_like(batch.reward, math.log(0.5))
    gap[0, 0], gap[1, 0] = math.log(1.5), math.log(4)
    ratio = torch.full_like(batch.reward, 0.5)
    ratio[0, 0], ratio[1, 0] = 1.5, 2.0
    batch = replace(batch, sampler_logprob=torch.where(batch.mask, old - gap, 0.0))
    row = trainer.update_policy(batch, signal, old, None, generator()).metrics
    weight = token_weights(batch.mask, torch.arange(len(batch)), "sequence-mean")
    assert row["actor/pg_loss"] == pytest.approx(-float((weight * ratio).sum()), rel=1e-4)
    prefix = "sampling/importance_sampling_ratio"
    assert row[f"{prefix}/mean"] == pytest.approx(float(ratio[batch.mask].mean()), rel=1e-4)
    assert (row[f"{prefix}/min"], row[f"{prefix}/max"]) == (pytest.approx(0.5, rel=1e-4), 2.0)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        # Rewards 1, 3 and 0, 8: deviations -1, 1 and -4, 4 from the groups' means.
        ("none", [-1, 1, -4, 4]),
        ("group", [-1 / math.sqrt(2), 1 / math.sqrt(2), -4 / math.sqrt(32), 4 / math.sqrt(32)]),
        ("batch", [x / math.sqrt(38 / 3) for x in (-1, 1, -4, 4)]),  # mean 3: (4 + 0 + 9 + 25) / 3
    ],
)
def test_scale_rewards(scale: Any, expected: list[float]) -> None:
    reward, group = torch.tensor([[1.0], [3.0], [0.0], [8.0]]), torch.tensor([0, 0, 1, 1])
    mask = torch.ones(4, 1, dtype=torch.bool)
    out = group_advantage(Outcome(reward, mask, mask, group), AdvantageOptions(scale_rewards=scale))
    torch.testing.assert_close(out.advantage[:, 0], torch.tensor(expected, dtype=torch.float32), atol=2e-4, rtol=0)


def test_scale_rewards_in_the_loop(tiny_config: Make, tiny_trainer: Make, signals: list) -> None:
    config = tiny_config(algorithm="grpo", scale_rewards="none")
    tiny_trainer(config, likes_a).step(1)
    reward, signal = signals[0]["outcome"].reward.sum(dim=1), signals[0]["result"]
    mean: Tensor = reward.view(3, 4).mean(dim=1).repeat_interleave(4)
    torch.testing.assert_close(signal.advantage[:, 0], reward - mean)


# --- λ by length, and masks ---


def test_length_adaptive_lambda_by_hand() -> None:
    got = length_adaptive_lambda(torch.tensor([100, 25, 20, 3]), alpha=0.05)
    torch.testing.assert_close(got, torch.tensor([0.8, 0.2, 0.0, 0.0]))


def test_length_adaptive_lambda_in_the_loop(
    tiny_config: Make, tiny_trainer: Make, scripted_sampler: Make, signals: list
) -> None:
    config = tiny_config(length_adaptive_alpha=0.5)
    trainer = tiny_trainer(config, likes_a, sampler=scripted_sampler([[3, 4, 5, 6, 1], [3, 4, 1]]))
    trainer.step(1)
    signal, reward = signals[0]["result"], signals[0]["outcome"].reward
    for row, (length, lam) in enumerate([(5, 1 - 1 / 2.5), (3, 1 - 1 / 1.5)]):
        value, advantage = [*signal.value[row, :length].tolist(), 0.0], 0.0
        for t in reversed(range(length)):
            advantage = float(reward[row, t]) + value[t + 1] - value[t] + lam * advantage
            assert float(signal.raw_advantage[row, t]) == pytest.approx(advantage, abs=1e-5)


def test_coarse_by_hand() -> None:
    step = 2.0**-12
    std = torch.tensor([0.0, 1.0, 1 + 0.49 * step, 1 + 0.51 * step, 3 * (1 + 1e-7), 1e-30, 7.25])
    expected = torch.tensor([0.0, 1.0, 1.0, 1 + step, 3.0, float(coarse(torch.tensor([1e-30]))), 7.25])
    assert torch.equal(coarse(std), expected)
    assert float(expected[5]) == pytest.approx(1e-30, rel=step / 2)


@pytest.mark.parametrize("seed", [0, 6])
def test_masks_do_not_depend_on_micro_batches(tiny_critic: Make, seed: int) -> None:
    """The same state has values that differ in their last bits between micro-batches of different shapes."""
    generator = torch.Generator().manual_seed(seed)
    large = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 192}
    critics = StackedCritics([tiny_critic(seed + 10 * m, **large) for m in (1, 2)])
    heads = [torch.randint(3, 19, (1 + i % 4,), generator=generator) for i in range(6)]
    responses = [
        torch.randint(3, 19, (1 + int(torch.randint(3, (), generator=generator)),), generator=generator)
        for _ in range(48)
    ]
    batch = make_batch(
        [heads[i // 8] for i in range(48)],
        responses,
        [torch.zeros(len(r)) for r in responses],
        [0.0] * 48,
        [False] * 48,
        [i // 8 for i in range(48)],
        pad_token_id=0,
        device=torch.device("cpu"),
    )
    masks = []
    for budget in (10, 40, 10_000):
        value = critics.values(batch, 2 * budget)
        outcome = Outcome(batch.reward, batch.mask, batch.mask, batch.group, value)
        signal = critics_advantage(outcome, AdvantageOptions(whiten="none"))
        masks.append((signal.advantage_keep, signal.entropy_keep))
    for advantage_keep, entropy_keep in masks[1:]:
        assert torch.equal(advantage_keep, masks[0][0])
        assert torch.equal(entropy_keep, masks[0][1])
    assert not masks[0][0][batch.mask].all()


# --- what is refused ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": 1.28}, r"delta: got 1\.28, needs more than 1 \+ epsilon_high = 1\.28"),
        ({"use_kl_in_reward": True}, r"use_kl_in_reward: got True, needs a beta above 0, got 0\.0"),
        ({"overlong_buffer_len": 256}, "overlong_buffer_len: got 256, needs less than max_completion_length = 256"),
        ({"overlong_buffer_len": -1}, "overlong_buffer_len: got -1, needs an integer of at least 0"),
        ({"overlong_penalty_factor": -0.5}, r"overlong_penalty_factor: got -0\.5, needs a number of at least 0"),
        ({"importance_sampling_clip_max": 0.0}, r"importance_sampling_clip_max: got 0\.0, needs a positive number"),
        (
            {"scale_rewards": "none"},
            "scale_rewards: got 'none', needs an algorithm that scales rewards, such as grpo; asyppo does not",
        ),
        ({"algorithm": "grpo", "advantage_values": "before"}, "advantage_values: got 'before', needs a critic"),
        ({"algorithm": "ppo", "advantage_values": "cross_fit"}, "advantage_values: got 'cross_fit', needs two critics"),
        (
            {"critic": CriticConfig(share="all"), "advantage_values": "cross_fit"},
            r"advantage_values: got 'cross_fit', needs critic\.share 'disjoint', got 'all'",
        ),
        (
            {"critic": CriticConfig(num_critics=9)},
            r"num_generations: got 8, needs at least critic\.num_critics = 9, so that every critic sees",
        ),
        ({"length_adaptive_alpha": 0.0}, r"length_adaptive_alpha: got 0\.0, needs a positive number"),
        ({"length_adaptive_alpha": 0.05, "algorithm": "grpo"}, r"length_adaptive_alpha: got 0\.05, needs a critic"),
        ({"critic": CriticConfig(cliprange_value=0.0)}, r"critic\.cliprange_value: got 0\.0, needs a positive number"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AsyPPOConfig(**settings).validate()


def test_more_critics_than_responses_where_all_learn_from_all() -> None:
    AsyPPOConfig(critic=CriticConfig(num_critics=9, share="all")).validate()
