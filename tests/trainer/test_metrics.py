"""Metrics against hand-made cases."""

from __future__ import annotations

import math

import pytest
import torch

from asyppo.algorithm.masked import masked_extremes, masked_mean, masked_moments, masked_sum
from asyppo.algorithm.options import PolicyLossOptions
from asyppo.algorithm.policy_losses import PolicyLossResult, PolicyTargets
from asyppo.algorithm.signal import LearningSignal
from asyppo.data.batch import Batch, make_batch
from asyppo.metrics import step as metrics
from asyppo.metrics.record import StepRecord
from asyppo.models.policy import TokenStats
from asyppo.rewards.computing import Rewards

MASK = torch.tensor([[True, True], [True, False]])


def batch() -> Batch:
    """Two responses, of two tokens and of one."""
    return make_batch(
        [torch.tensor([3, 4]), torch.tensor([5])],
        [torch.tensor([6, 1]), torch.tensor([7])],
        [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])],
        [1.0, -0.5],
        [False, True],
        [0, 1],
        pad_token_id=0,
        device=torch.device("cpu"),
    )


def signal(returns: list, value: list) -> LearningSignal:
    """A signal; NaN where there is padding, since nothing of it may be read."""
    return LearningSignal(
        advantage=torch.tensor([[9.0, 9.0], [9.0, math.nan]]),
        advantage_keep=torch.tensor([[False, True], [True, False]]),
        entropy_keep=torch.tensor([[True, False], [False, False]]),
        raw_advantage=torch.tensor([[1.0, 2.0], [6.0, math.nan]]),
        returns=torch.tensor(returns),
        value=torch.tensor(value),
        values=torch.tensor([value, value]),
        std=torch.tensor([[0.1, 0.2], [0.6, math.nan]]),
        low=torch.tensor(0.1),
        high=torch.tensor(0.5),
    )


def record(of: LearningSignal, logprob: torch.Tensor, entropy: torch.Tensor) -> StepRecord:
    """What a step that sampled ``batch`` leaves behind."""
    return StepRecord(1, batch(), Rewards({}, [], {}), TokenStats(logprob, entropy), MASK, of, torch.zeros(2, 2))


def test_batch_metrics() -> None:
    entropy = torch.tensor([[0.5, 1.0], [3.0, math.nan]])
    old = torch.tensor([[-1.5, -2.0], [-4.0, math.nan]])
    returns, value = [[1.0, 3.0], [5.0, math.nan]], [[1.0, 2.0], [6.0, math.nan]]
    row = metrics.batch_metrics(record(signal(returns, value), old, entropy))
    expected = {
        "actor/entropy": 1.5,
        "actor/adv_mask_frac": 1 / 3,
        "actor/entropy_keep_frac": 1 / 3,
        "critic/score/mean": 0.25,
        "critic/score/min": -0.5,
        "critic/score/max": 1.0,
        "critic/advantages/mean": 3.0,
        "critic/advantages/max": 6.0,
        "critic/returns/mean": 3.0,
        "critic/values/mean": 3.0,
        # Errors 0, 1, -1: variance 2/3. Returns 1, 3, 5: variance 8/3.
        "critic/vf_explained_var": 0.75,
        "critic/std/mean": 0.3,
        "critic/std/low": 0.1,
        "critic/std/high": 0.5,
        "response_length/mean": 1.5,
        "response_length/min": 1.0,
        "response_length/max": 2.0,
        "response_length/clip_ratio": 0.5,
        "prompt_length/mean": 1.5,
        "sampling/sampling_logp_difference/mean": 0.5,
        "sampling/sampling_logp_difference/max": 1.0,
    }
    assert {key: row[key] for key in expected} == pytest.approx(expected)


def test_reward_metrics() -> None:
    """None is in no mean; a function that has no reward for anything has zeros."""
    rewards = Rewards({"f": [1.0, 2.0, 6.0], "g": [None, -2.5, 0.5], "h": [None] * 3}, [0.0] * 3, {"g": 1})
    assert metrics.reward_metrics(rewards) == pytest.approx(
        {
            "rewards/f/mean": 3.0,
            "rewards/f/std": (14 / 3) ** 0.5,
            "rewards/g/mean": -1.0,
            "rewards/g/std": 1.5,
            "rewards/h/mean": 0.0,
            "rewards/h/std": 0.0,
            "rewards/g/timeouts": 1.0,
        }
    )


def test_explained_variance_of_returns_that_do_not_vary() -> None:
    """It is not defined; a huge negative number would hide the rest of the curve."""
    returns, value = [[1.0, 1.0], [1.0, 0.0]], [[1.0, 2.0], [6.0, 0.0]]
    zeros = torch.zeros(2, 2)
    row = metrics.batch_metrics(record(signal(returns, value), zeros, zeros))
    assert math.isnan(row["critic/vf_explained_var"])


def update(loss: float, logprob: list, entropy: list, clipped: list, dual_clipped: list, kl: list) -> PolicyLossResult:
    """What the loss returned."""
    logprob_ = torch.tensor(logprob)
    of_token = (torch.tensor(x) for x in (entropy, logprob_.exp().tolist(), clipped, dual_clipped, kl))
    return PolicyLossResult(torch.tensor(loss), logprob_, *of_token)


def test_policy_updates() -> None:
    updates = metrics.PolicyUpdates(PolicyLossOptions(entropy_coef=0.1, kl_coef=0.2))
    targets = PolicyTargets(
        old_logprob=torch.tensor([-1.0, -2.0, -9.0]),
        advantage=torch.zeros(3),
        token_weight=torch.tensor([0.5, 0.25, 0.0]),
        advantage_keep=torch.ones(3, dtype=torch.bool),
        entropy_keep=torch.tensor([True, False, True]),
    )
    none, last = [False] * 3, [False, True, True]
    updates.add(update(0.0, [-1.5, -2.0, 0.0], [2.0, 3.0, 0.0], [True, False, False], none, [0.3, 0.0, 0.0]), targets)
    updates.stepped(0.7, 3.0)
    updates.add(update(0.0, [-1.0, -2.5, 0.0], [1.0, 1.0, 0.0], last, last, [0.0, 0.5, 0.0]), targets)
    updates.stepped(0.5, None)
    row = updates.row()
    entropy, kl = (0.5 * 2 + 0.5 * 1) / 2, (0.5 * 0.3 + 0.25 * 0.5) / 2
    expected = {
        "actor/loss": 0.6,
        # The loss is pg - 0.1 entropy + 0.2 KL.
        "actor/pg_loss": 0.6 + 0.1 * entropy - 0.2 * kl,
        "actor/entropy_loss": entropy,
        "actor/kl_loss": kl,
        "actor/ppo_kl": (0.5 + 0.5) / 4,  # rows of weight 0 do not count
        "actor/pg_clipfrac": 1 / 4,  # verl's: without what the dual clip stopped
        "actor/pg_clipfrac_lower": 1 / 4,
        "actor/grad_norm": 3.0,
        "actor/skipped_updates": 1.0,
    }
    assert {key: row[key] for key in expected} == pytest.approx(expected)


def test_time_metrics() -> None:
    row = metrics.time_metrics(batch(), {"timing_s/step": 2.0}, torch.device("cpu"))
    assert row == {
        "timing_s/step": 2.0,
        "perf/total_num_tokens": 6.0,
        "perf/time_per_step": 2.0,
        "perf/throughput": 3.0,
    }


def test_masked_statistics() -> None:
    value = torch.tensor([[1.0, 5.0], [3.0, math.nan]])
    assert float(masked_sum(value, MASK)) == 9
    assert float(masked_mean(value, MASK)) == 3
    assert [float(x) for x in masked_moments(value, MASK)] == pytest.approx([3, 8 / 3])
    assert [float(x) for x in masked_extremes(value, MASK)] == [1, 5]
    nothing = torch.zeros_like(MASK)
    assert [float(x) for x in (*masked_moments(value, nothing), *masked_extremes(value, nothing))] == [0, 0, 0, 0]
