"""Advantages, masks and weights against hand-made cases and plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from asyppo.algorithm.advantage import critics_advantage, group_advantage, whiten
from asyppo.algorithm.options import AdvantageOptions
from asyppo.algorithm.signal import LearningSignal, Outcome
from asyppo.algorithm.weights import token_weights
from asyppo.data.batch import Batch

SETTINGS: dict[str, Any] = {
    "gamma": 1.0,
    "lam": 1.0,
    "value_lambda": 1.0,
    "whiten": "none",
    "advantage_mask_fraction": 0.0,
    "entropy_filter_fraction": 0.0,
    "quantile_scope": "batch",
}


def signal(value: list, reward: list, mask: list, group: list | None = None, **settings: Any) -> LearningSignal:
    """``critics_advantage`` of nested lists."""
    valid, groups = torch.tensor(mask), torch.tensor(group or [0] * len(mask))
    outcome = Outcome(torch.tensor(reward), valid, valid, groups, torch.tensor(value))
    return critics_advantage(outcome, AdvantageOptions(**(SETTINGS | settings)))


def group_signal(reward: torch.Tensor, mask: torch.Tensor, group: torch.Tensor) -> LearningSignal:
    """``group_advantage`` with the defaults."""
    return group_advantage(Outcome(reward, mask, mask, group), AdvantageOptions())


def test_whiten_none() -> None:
    advantage = torch.tensor([[1.0, 2.0]])
    assert whiten(advantage, torch.tensor([[True, True]]), torch.tensor([0]), "none") is advantage


def test_whiten_batch() -> None:
    advantage = torch.tensor([[1.0, 3.0, math.nan], [5.0, math.inf, 7.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    # Of 1, 3, 5, 7: mean 4, population variance 5.
    expected = torch.tensor([[-3.0, -1.0, 0.0], [1.0, 0.0, 3.0]]) / math.sqrt(5)
    torch.testing.assert_close(whiten(advantage, mask, torch.tensor([0, 1]), "batch"), expected)


def test_whiten_group() -> None:
    advantage = torch.tensor([[1.0, 3.0], [10.0, math.nan], [8.0, -1.0], [20.0, 40.0]])
    mask = torch.tensor([[True, True], [True, False], [True, False], [True, True]])
    # Group 3 is rows 0 and 2 (1, 3, 8: mean 4, variance 26/3), group 1 rows 1 and 3 (10, 20, 40: mean 70/3).
    deviation, other = math.sqrt(26 / 3), math.sqrt((40**2 + 10**2 + 50**2) / 27)
    expected = torch.tensor(
        [
            [-3 / deviation, -1 / deviation],
            [-40 / 3 / other, 0.0],
            [4 / deviation, 0.0],
            [-10 / 3 / other, 50 / 3 / other],
        ]
    )
    torch.testing.assert_close(whiten(advantage, mask, torch.tensor([3, 1, 3, 1]), "group"), expected)


@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_whitening_equal_advantages_gives_zero(scope: Any, count: int) -> None:
    mask = torch.arange(3)[None] < count
    whitened = whiten(torch.full((1, 3), 7.3), mask, torch.tensor([0]), scope)
    torch.testing.assert_close(whitened, torch.zeros(1, 3), atol=1e-2, rtol=0)  # rounding errors are not blown up
    assert whitened[~mask].tolist() == [0.0] * (3 - count)


def test_ensemble_signal_by_hand() -> None:
    # Critics 1 and 3 at both tokens of row 0: mean 2, deviation 1. Row 1 has one token: mean 0, deviation 2.
    out = signal(
        [[[1.0, 1.0], [-2.0, math.nan]], [[3.0, 3.0], [2.0, math.nan]]],
        [[0.0, 4.0], [1.0, math.nan]],
        [[True, True], [True, False]],
        gamma=0.5,
        lam=0.5,
        value_lambda=0.0,
    )
    # delta_1 = 4 - 2 = 2; delta_0 = 0 + 0.5 * 2 - 2 = -1, plus 0.25 * 2.
    assert out.raw_advantage.tolist() == [[-0.5, 2.0], [1.0, 0.0]]
    assert out.advantage.tolist() == out.raw_advantage.tolist()
    assert out.returns.tolist() == [[1.0, 4.0], [1.0, 0.0]]  # one-step: r + gamma V'
    assert out.value.tolist() == [[2.0, 2.0], [0.0, 0.0]]
    assert out.std.tolist() == [[1.0, 1.0], [2.0, 0.0]]
    assert out.advantage_keep.tolist() == out.entropy_keep.tolist() == [[True, True], [True, False]]


# Deviations 1 2 3 4 5 in row 0 and 6 7 8 9 (one token of padding) in row 1.
DEVIATIONS = torch.tensor([[1.0, 2, 3, 4, 5], [9.0, 8, 7, 6, 100]])
VALUES = torch.stack([DEVIATIONS, -DEVIATIONS]).tolist()
VALID = [[True] * 5, [True] * 4 + [False]]
ZEROS = [[0.0] * 5] * 2


def test_quantiles_over_the_batch() -> None:
    out = signal(VALUES, ZEROS, VALID, advantage_mask_fraction=0.25, entropy_filter_fraction=0.34)
    assert out.advantage_keep.tolist() == [[False, False, True, True, True], [True] * 4 + [False]]
    assert out.entropy_keep.tolist() == [[True] * 5, [False, False, False, True, False]]
    assert (float(out.low), float(out.high)) == (3, 6)


def test_quantiles_over_each_sequence() -> None:
    out = signal(
        VALUES, ZEROS, VALID, advantage_mask_fraction=0.25, entropy_filter_fraction=0.5, quantile_scope="sequence"
    )  # of 5 tokens: 1 and 2; of 4: 1 and 2
    assert out.advantage_keep.tolist() == [[False, True, True, True, True], [True, True, True, False, False]]
    assert out.entropy_keep.tolist() == [[True, True, True, False, False], [False, False, True, True, False]]
    assert (float(out.low), float(out.high)) == ((2 + 7) / 2, (3 + 7) / 2)


def test_quantiles_over_each_position() -> None:
    out = signal(
        VALUES, ZEROS, VALID, advantage_mask_fraction=0.5, entropy_filter_fraction=0.5, quantile_scope="position"
    )  # 1 and 9, 2 and 8, 3 and 7, 4 and 6, and 5 alone
    assert out.advantage_keep.tolist() == [[False] * 4 + [True], [True] * 4 + [False]]
    assert out.entropy_keep.tolist() == [[True] * 5, [False] * 5]
    assert (float(out.low), float(out.high)) == ((9 + 8 + 7 + 6 + 5) / 5, (1 + 2 + 3 + 4 + 5) / 5)


def test_the_first_tokens_may_be_left_alone() -> None:
    """k is of the others: of 3, 4, 5, 7 and 6."""
    out = signal(VALUES, ZEROS, VALID, advantage_mask_fraction=0.4, entropy_filter_fraction=0.34, advantage_mask_skip=2)
    assert out.advantage_keep.tolist() == [[True, True, False, False, True], [True] * 4 + [False]]
    assert out.entropy_keep.tolist() == [[True] * 5, [False, False, False, True, False]]  # as without it
    assert (float(out.low), float(out.high)) == (5, 6)
    out = signal(VALUES, ZEROS, VALID, advantage_mask_fraction=0.4, advantage_mask_skip=5)
    assert out.advantage_keep.tolist() == VALID


def test_no_mask() -> None:
    out = signal(VALUES, ZEROS, VALID, advantage_mask="none", advantage_mask_fraction=0.4, advantage_mask_skip=1)
    assert out.advantage_keep.tolist() == VALID
    same = signal(VALUES, ZEROS, VALID, advantage_mask_fraction=0.0)
    assert torch.equal(same.advantage_keep, out.advantage_keep)


@pytest.mark.parametrize("critics", [1, 2])
def test_a_random_mask_drops_as_many_by_the_seed(critics: int) -> None:
    mask = torch.arange(50) < torch.randint(1, 51, (40, 1))
    ignored = torch.arange(40) % 8 == 0
    outcome = Outcome(
        torch.zeros(40, 50), mask, mask & ~ignored[:, None], torch.arange(40), torch.rand(critics, 40, 50), seed=7
    )
    options = AdvantageOptions(advantage_mask="random", advantage_mask_skip=3)

    def kept(outcome: Outcome, options: AdvantageOptions = options) -> torch.Tensor:
        return critics_advantage(outcome, options).advantage_keep

    keep, learned = kept(outcome), outcome.learned
    late = learned & (torch.arange(50) >= 3)
    assert torch.equal(keep | late, learned)
    assert int((late & ~keep).sum()) == int(0.2 * int(late.sum()))
    assert torch.equal(keep, kept(outcome))
    assert torch.equal(keep, kept(replace(outcome, values=torch.rand(critics, 40, 50))))
    other = kept(replace(outcome, seed=8))
    shared, dropped = int((late & ~keep & ~other).sum()), int((late & ~keep).sum())
    assert abs(shared - 0.2 * dropped) < 5 * math.sqrt(0.16 * dropped)
    of_sigma = critics_advantage(outcome, AdvantageOptions(advantage_mask="sigma"))
    assert torch.equal(critics_advantage(outcome, options).entropy_keep, of_sigma.entropy_keep)


def test_advantages_are_whitened_before_they_are_masked() -> None:
    value = torch.stack([DEVIATIONS, -DEVIATIONS])
    value[:, 0, 0] += 50  # the token that the mask drops is the one with the outlying advantage
    out = signal(value.tolist(), ZEROS, VALID, advantage_mask_fraction=0.2, whiten="batch")
    assert not out.advantage_keep[0, 0]
    chosen = out.advantage[torch.tensor(VALID)]
    torch.testing.assert_close(chosen.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(chosen.square().mean(), torch.tensor(1.0))
    assert out.advantage[0, 0] < -2


def test_one_critic_masks_nothing() -> None:
    out = signal([DEVIATIONS.tolist()], ZEROS, VALID, advantage_mask_fraction=0.2, entropy_filter_fraction=0.2)
    assert out.advantage_keep.tolist() == out.entropy_keep.tolist() == VALID


def test_group_signal_against_a_plain_loop() -> None:
    scores = [1.0, 0.0, 3.0, 0.5, 0.25, 2.0, -1.0]
    group = [2, 0, 2, 0, 0, 2, 1]
    reward = torch.zeros(7, 3)
    reward[:, 1] = torch.tensor(scores)
    mask = torch.tensor([[True, True, i % 2 == 0] for i in range(7)])
    out = group_signal(reward, mask, torch.tensor(group))
    for i, score in enumerate(scores):
        same = [s for s, g in zip(scores, group, strict=True) if g == group[i]]
        mean = sum(same) / len(same)
        # TRL's: (reward - mean) / (sample standard deviation + 1e-4)
        deviation = math.sqrt(sum((s - mean) ** 2 for s in same) / (len(same) - 1)) if len(same) > 1 else 0.0
        for t in range(3):
            expected = (score - mean) / (deviation + 1e-4) if mask[i, t] else 0.0
            assert float(out.advantage[i, t]) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(out.advantage_keep, mask)
    assert torch.equal(out.entropy_keep, mask)


def test_group_of_equal_rewards_gets_no_advantage() -> None:
    reward = torch.tensor([[0.1, 0.0], [0.0, 0.1], [0.1, 0.0]])
    out = group_signal(reward, torch.tensor([[True, False], [True, True], [True, False]]), torch.tensor([0, 0, 0]))
    torch.testing.assert_close(out.advantage, torch.zeros(3, 2), atol=1e-3, rtol=0)


MASK = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [True, True, False]])


def test_sequence_mean_weights() -> None:
    weight = token_weights(MASK, torch.tensor([0, 2]), "sequence-mean")
    expected = [[1 / 4, 1 / 4, 0], [0, 0, 0], [1 / 6, 1 / 6, 1 / 6], [0, 0, 0]]
    torch.testing.assert_close(weight, torch.tensor(expected))


def test_token_mean_weights() -> None:
    weight = token_weights(MASK, torch.tensor([3, 2]), "token-mean")
    expected = [[0, 0, 0], [0, 0, 0], [1 / 5, 1 / 5, 1 / 5], [1 / 5, 1 / 5, 0]]
    torch.testing.assert_close(weight, torch.tensor(expected))


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean"])
def test_weights_of_a_minibatch_add_up_to_one(aggregation: Any, ragged_batch: Callable[..., Batch]) -> None:
    batch = ragged_batch()
    weight = token_weights(batch.mask, torch.tensor([7, 1, 3]), aggregation)
    assert float(weight.sum()) == pytest.approx(1)
    assert weight.dtype == torch.float32
