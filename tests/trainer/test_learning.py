"""Each algorithm solves a task of a few seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Make = Callable[..., Any]


def is_a(completions: list[str], **_: Any) -> list[float]:
    """1 for a response that begins with an a."""
    return [float(c.startswith("a")) for c in completions]


def copies_the_prompt(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1 for a response that begins with the prompt's last letter."""
    return [float(c.startswith(p[-1])) for p, c in zip(prompts, completions, strict=True)]


@pytest.mark.parametrize("algorithm", ["asyppo", "ppo", "grpo"])
def test_a_bandit(tiny_config: Make, tiny_trainer: Make, algorithm: Any) -> None:
    config = tiny_config(
        algorithm=algorithm, num_generations=8, max_completion_length=2, num_mini_batches=2, max_steps=25
    )
    trainer = tiny_trainer(config, is_a)
    scores = [trainer.step(step).metrics["critic/score/mean"] for step in range(1, config.max_steps + 1)]
    assert sum(scores[:2]) / 2 < 0.3, scores
    assert sum(scores[-5:]) / 5 > 0.8, scores


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["asyppo", "grpo"])
def test_a_response_that_depends_on_the_prompt(tiny_config: Make, tiny_trainer: Make, algorithm: Any) -> None:
    config = tiny_config(
        algorithm=algorithm,
        num_generations=16,
        prompts_per_step=4,
        max_completion_length=1,
        num_mini_batches=4,
        max_steps=25,
        entropy_coef=0.02,
        evaluation={"num_generations": 20},
    )
    rows = [{"prompt": "ab"}, {"prompt": "ba"}]
    trainer = tiny_trainer(config, copies_the_prompt, train_dataset=rows, eval_dataset=rows)
    result = trainer.train()
    assert result.accuracy_before < 0.35
    assert result.accuracy_after > 0.8


def test_critics_learn_the_value(tiny_config: Make, tiny_trainer: Make) -> None:
    """The reward follows from the prompt alone, so a good critic leaves nothing unexplained."""

    def reward(prompts: list[str], **_: Any) -> list[float]:
        return [float(len(p) > 3) for p in prompts]

    config = tiny_config(learning_rate=1e-9, prompts_per_step=8, critic={"num_mini_batches": 4})
    trainer = tiny_trainer(config, reward)
    rows = [trainer.step(step).metrics for step in range(1, 16)]
    assert rows[0]["critic/vf_explained_var"] < 0.7
    assert rows[-1]["critic/vf_explained_var"] > 0.9
    assert rows[-1]["critic/vf_loss"] < 0.1 * rows[0]["critic/vf_loss"]
    assert rows[-1]["critic/std/mean"] < rows[0]["critic/std/mean"]
