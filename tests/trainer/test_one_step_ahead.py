"""Sampling one step ahead: whose responses a step learns from, how they are weighted, and that no prompt is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import TrainerCallback

from asyppo.config import ConfigError
from asyppo.models.policy import Policy
from asyppo.rollout.samplers import GenerateSampler
from asyppo.run.directory import read_jsonl

Make = Callable[..., Any]


class Engine:
    """Samples with a copy of the weights, at once, and keeps what happens to it."""

    def __init__(self, model: Any):
        self.model = model
        self.events: list[tuple[str, list[str]]] = []
        self.sampler = GenerateSampler(model, eos_token_ids=[1], pad_token_id=0)

    def texts(self, prompts: Any) -> list[str]:
        """Return the letters of prompts."""
        return ["".join(chr(ord("a") + token - 3) for token in prompt.tolist()) for prompt in prompts]

    def update_weights(self, weights: Any) -> None:
        """Copy them."""
        self.model.load_state_dict({name: weight.clone() for name, weight in weights})
        self.events.append(("weights", []))

    def sample(self, prompts: Any, **limits: Any) -> Any:
        """Sample."""
        self.events.append(("sample", self.texts(prompts)))
        return self.sampler.sample(prompts, **limits)

    def begin(self, prompts: Any, **limits: Any) -> Any:
        """Sample now, and hand it out later."""
        self.events.append(("begin", self.texts(prompts)))
        responses = self.sampler.sample(prompts, **limits)
        return lambda: responses


def likes_a(completions: list[str], **_: Any) -> list[float]:
    """Reward the letter a."""
    return [float(completion.count("a")) for completion in completions]


class StopsAfter(TrainerCallback):
    """Ends a run early, with a batch under way."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop."""
        control.should_training_stop |= state.global_step == self.step


def test_a_step_learns_from_the_policy_of_before_the_last_update_and_no_prompt_is_lost(
    tiny_config: Make, tiny_trainer: Make, tiny_lm: Make
) -> None:
    config = tiny_config(
        algorithm="grpo", learning_rate=0.05, async_generation=1, max_steps=5, resume=True, report_to=[]
    )
    kinds, asked = [], []
    for stop in (3, 5):
        engine = Engine(tiny_lm(seed=7))
        trainer = tiny_trainer(config, likes_a, policy=Policy(tiny_lm()), sampler=engine, callbacks=[StopsAfter(stop)])
        rows = read_jsonl(trainer.train().run.metrics)
        kinds.append([kind for kind, _ in engine.events])
        asked += [prompts for kind, prompts in engine.events if len(prompts) == 12]
    check = ["weights", "sample"]
    assert kinds == [
        # Step 1, a check after its update, and its weights are those of the third batch, too.
        [*check, "sample", "begin", *check, "begin", "weights", "begin"],
        # Steps 4 and 5: the batch that was under way is sampled anew.
        [*check, "weights", "sample", "begin"],
    ]
    of_step = [trainer.rollout.schedule.rows_of_step(step) for step in range(5)]
    texts = [[trainer.train_dataset[row]["prompt"] for row in rows for _ in range(4)] for rows in of_step]
    assert asked == [texts[step] for step in (0, 1, 2, 3, 3, 4)]
    assert [(row["step"], row["sampling/age"]) for row in rows] == [(1, 0), (2, 1), (3, 1), (4, 0), (5, 1)]
    for row in rows:
        assert (row["sampling/sampling_logp_difference/mean"] < 1e-5) == (row["sampling/age"] == 0)
        assert "sampling/importance_sampling_ratio/mean" in row  # without being asked for


def test_it_is_refused_where_it_cannot_be(tiny_config: Make, tiny_trainer: Make) -> None:
    with pytest.raises(
        ConfigError, match=r"^async_generation: got 1, needs a sampler with an engine .*; auto has none$"
    ):
        tiny_trainer(tiny_config(async_generation=1), likes_a)
    with pytest.raises(ConfigError, match=r"^async_generation: got 1, needs 0 with dynamic_sampling"):
        tiny_config(async_generation=1, dynamic_sampling=True).validate()
