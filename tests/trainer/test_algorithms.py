"""The table of algorithms: advantages by hand, and entries of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from asyppo.algorithm.advantage import (
    critics_advantage,
    leave_one_out_advantage,
    reward_to_go_advantage,
    unmasked_signal,
)
from asyppo.algorithm.algorithms import ALGORITHMS
from asyppo.algorithm.options import AdvantageOptions
from asyppo.algorithm.signal import LearningSignal, Outcome
from asyppo.config import AsyPPOConfig, ConfigError

Make = Callable[..., Any]


def outcome() -> Outcome:
    """Two prompts: three responses with scores 1, 3, 8, and two with 0 and 4; one token of the last does not count."""
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, False], [True, True]])
    reward = torch.tensor([[0.0, 1.0], [3.0, 0.0], [2.0, 6.0], [0.0, 0.0], [0.0, 4.0]])
    learned = mask.clone()
    learned[4, 1] = False
    return Outcome(reward, mask, learned, torch.tensor([0, 0, 0, 1, 1]))


def test_leave_one_out_by_hand() -> None:
    signal = leave_one_out_advantage(outcome(), AdvantageOptions())
    expected = [1 - 5.5, 3 - 4.5, 8 - 2.0, 0 - 4.0, 4 - 0.0]
    assert signal.advantage[:, 0].tolist() == expected
    assert signal.advantage[1].tolist() == [3 - 4.5, 0.0]
    assert torch.equal(signal.advantage_keep, outcome().learned)
    assert signal.value[:, 0].tolist() == [5.5, 4.5, 2.0, 4.0, 0.0]


def test_leave_one_out_of_a_group_of_one_is_the_reward() -> None:
    mask = torch.tensor([[True]])
    signal = leave_one_out_advantage(Outcome(torch.tensor([[2.0]]), mask, mask, torch.tensor([0])), AdvantageOptions())
    assert signal.advantage.tolist() == [[2.0]]


def test_reward_to_go_by_hand() -> None:
    signal = reward_to_go_advantage(outcome(), AdvantageOptions(gamma=0.5, whiten="none"))
    assert signal.advantage.tolist() == [[0.5, 1.0], [3.0, 0.0], [5.0, 6.0], [0.0, 0.0], [2.0, 4.0]]
    whitened = reward_to_go_advantage(outcome(), AdvantageOptions(gamma=0.5)).advantage[outcome().learned]
    # Of 0.5, 1, 3, 5, 6, 0, 2: the token that does not count is in no statistic.
    assert float(whitened.mean()) == pytest.approx(0, abs=1e-6)
    assert float(whitened.square().mean()) == pytest.approx(1, abs=1e-5)


def test_values_are_needed() -> None:
    with pytest.raises(ValueError, match="values: got None, needs the values"):
        critics_advantage(outcome(), AdvantageOptions())


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_algorithm_trains(name: str, tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config(algorithm=name)
    trainer = tiny_trainer(config, lambda completions, **_: [float(c.count("a")) for c in completions])
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    row = trainer.step(1).metrics
    assert ("critic/vf_loss" in row) == (config.num_critics > 0)
    assert row["actor/grad_norm"] > 0
    assert not all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True))


OWN = """
import torch
from asyppo.algorithm.advantage import critics_advantage, unmasked_signal
from asyppo.algorithm.algorithms import Algorithm

def centred(outcome, options):
    score = outcome.reward.sum(dim=1)
    return unmasked_signal(outcome, torch.where(outcome.mask, (score - score.mean())[:, None], 0.0))

guided = Algorithm(critics_advantage, critics="mini")
wrong = lambda outcome, options: outcome.reward
halves = lambda batch, tokenizer: torch.full_like(batch.reward, 0.5)[None].repeat(2, 1, 1)
valued = Algorithm(critics_advantage, values=halves)
short = Algorithm(critics_advantage, values=lambda batch, tokenizer: torch.zeros(1, 2, 3))
both = Algorithm(critics_advantage, critics="mini", values=halves)
number = 3
"""


def test_one_of_ones_own(tmp_path: Any, tiny_config: Make, tiny_trainer: Make) -> None:
    """A function has no critics; an ``Algorithm`` says what it needs."""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    plain, guided = (tiny_config(algorithm=f"{file}:{name}") for name in ("centred", "guided"))
    assert (plain.num_critics, guided.num_critics) == (0, 2)
    assert "critic/vf_loss" not in tiny_trainer(plain, reward).step(1).metrics
    assert "critic/1/vf_loss" in tiny_trainer(guided, reward).step(1).metrics
    with pytest.raises(ConfigError, match=r"algorithm: .*own\.py:wrong returned Tensor, needs a LearningSignal"):
        tiny_trainer(tiny_config(algorithm=f"{file}:wrong"), reward).step(1)
    with pytest.raises(ConfigError, match=r"algorithm: got .*:number', but .* has no function 'number'"):
        tiny_config(algorithm=f"{file}:number").validate()


def test_values_of_ones_own(tmp_path: Any, tiny_config: Make, tiny_trainer: Make) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    config = tiny_config(algorithm=f"{file}:valued", advantage_mask="random")
    row = tiny_trainer(config, reward).step(1).metrics
    assert (config.num_critics, row["critic/values/mean"], row["critic/std/mean"]) == (0, 0.5, 0.0)
    assert row["actor/adv_mask_frac"] > 0
    assert "critic/1/vf_explained_var" in row
    assert "critic/vf_loss" not in row
    with pytest.raises(
        ConfigError, match=r"algorithm: the values of .*own\.py:short came as torch.float32 \[1, 2, 3\], need float32"
    ):
        tiny_trainer(tiny_config(algorithm=f"{file}:short"), reward).step(1)
    with pytest.raises(ConfigError, match=r"algorithm: got .*:both', needs values of its own or mini critics, not bo"):
        tiny_config(algorithm=f"{file}:both").validate()


def test_without_values_there_is_no_mask() -> None:
    with pytest.raises(ConfigError, match="advantage_mask: got 'random', needs a critic, algorithm grpo has none and"):
        AsyPPOConfig(algorithm="grpo", advantage_mask="random").validate()


def reward(completions: list[str], **_: Any) -> list[float]:
    """Count a's."""
    return [float(c.count("a")) for c in completions]


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_those_that_compare_need_a_group(name: str) -> None:
    with pytest.raises(ConfigError, match=f"num_generations: got 1, needs at least 2 for algorithm {name}, which"):
        AsyPPOConfig(algorithm=name, num_generations=1).validate()
    AsyPPOConfig(algorithm="reinforce++", num_generations=1).validate()


def test_a_signal_of_an_advantage_alone() -> None:
    made: LearningSignal = unmasked_signal(outcome(), torch.ones(5, 2))
    assert not made.value.any()
    assert len(made.values) == 0
