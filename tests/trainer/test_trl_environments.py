"""An environment written for TRL's trainer, under TRL's trainer and under ours: the same episodes.

The class, the reward function and the rows are what a script for ``trl.GRPOTrainer`` has; nothing in them knows of us.
What the policy says is a script, so that both trainers meet the same turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from asyppo.config import AsyPPOConfig, ConfigError, DataConfig, EnvironmentConfig
from asyppo.models.policy import Policy
from asyppo.rollout.samplers import Response
from asyppo.run.progress import Timer
from asyppo.trainer import AsyPPOTrainer

trl = pytest.importorskip("trl", reason="trl is not installed")
from datasets import Dataset  # noqa: E402  (it comes with trl)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # transformers renames what TRL 1.16 calls
    pytest.mark.filterwarnings("ignore:You are using 'environment_factory'"),
]


class Lock:
    """A lock with three digits, turned one at a time."""

    def __init__(self) -> None:
        self.reward = 0.0
        self.done = False

    def reset(self, **kwargs: Any) -> str:
        self.reward, self.done = 0.0, False
        self.combination, self.turned = kwargs["combination"], ""
        return f"\nThe first digit is {self.combination[0]}."

    def turn(self, digit: int) -> str:
        """
        Turn to the next digit.

        Args:
            digit: The digit, 0 to 9.

        Returns:
            What the lock does.
        """
        self.turned += str(digit)
        if not self.combination.startswith(self.turned):
            self.turned = ""
            return "It snaps back."
        self.done = self.turned == self.combination
        self.reward = len(self.turned) / len(self.combination)
        return "It opens." if self.done else f"Click. The next one is {self.combination[len(self.turned)]}."

    def listen(self) -> str:
        """
        Listen to the lock.

        Returns:
            What is heard.
        """
        return f"{len(self.turned)} clicks"


def opened(environments: list[Lock], **kwargs: Any) -> list[float]:
    """What the script gives its trainer as reward function."""
    return [env.reward if env.done else 0.0 for env in environments]


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


ROWS = {
    "prompt": [[{"role": "user", "content": "Open the lock."}], [{"role": "user", "content": "Open this one."}]],
    "combination": ["123", "44"],
}
SAID = {
    "Open the lock.": [
        [called("turn", digit=1), called("turn", digit=2), called("turn", digit=3), "It is open."],
        [called("turn", digit=1) + called("listen"), called("turn", digit=7), "I give up."],
    ],
    "Open this one.": [["How?"], [called("listen"), called("turn", digit=4), called("turn", digit=4), "Done."]],
}
"""Turns of the episodes of each prompt."""

Heard = list[tuple[str, list[dict[str, Any]], float]]
"""What a reward function was told of each episode, and what it gave."""


class Script:
    """Says what is next in the episode that a prompt has come to."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer, self.begun = tokenizer, dict.fromkeys(SAID, 0)
        self.under_way: dict[str, int] = {}
        """Which episode of its prompt it is, by the last text of one."""

    def next(self, prompt: Sequence[int]) -> list[int]:
        text = self.tokenizer.decode(prompt)
        name = next(name for name in SAID if name in text)
        begins = text.count("<|im_start|>assistant") == 1
        if begins:
            episode = self.begun[name]
            self.begun[name] += 1
        else:
            episode = next(i for known, i in self.under_way.items() if text.startswith(known))
        turn = SAID[name][episode][text.count("<|im_start|>assistant") - 1] + "<|im_end|>"
        self.under_way[text + turn] = episode
        return self.tokenizer(turn, add_special_tokens=False)["input_ids"]

    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """As a ``Sampler``."""
        drawn = [torch.tensor(self.next(prompt.tolist())) for prompt in prompts]
        return [Response(tokens, torch.full((len(tokens),), -1.0), False) for tokens in drawn]


def listening(heard: Heard) -> Callable[..., list[float]]:
    """``opened``, and what it was told, without what trainers write differently of a turn that calls nothing."""

    def func(environments: list[Lock], **told: Any) -> list[float]:
        rewards = opened(environments, **told)
        for prompt, completion, combination, reward in zip(
            told["prompts"], told["completions"], told["combination"], rewards, strict=True
        ):
            assert combination in ROWS["combination"]
            messages = [
                {name: m[name] for name in ("role", "content", "tool_calls") if m.get(name)} for m in completion
            ]
            heard.append((prompt[0]["content"][:14], messages, reward))
        return rewards

    return func


@pytest.mark.slow
def test_an_environment_in_trls_form_plays_the_same_episodes(
    chat: PreTrainedTokenizerFast, tiny_lm: Callable[..., Qwen3ForCausalLM], tmp_path: Path
) -> None:
    tiny_lm(vocab_size=len(chat), max_position_embeddings=4096).save_pretrained(tmp_path / "model")
    chat.save_pretrained(tmp_path / "model")
    dataset, theirs, ours = Dataset.from_dict(ROWS), [], []

    script = Script(chat)
    scored: list[dict[str, Any]] = []

    class Scripted(trl.GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            return [script.next(ids) for ids in prompt_ids], None

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            scored.append(super()._generate_and_score_completions(inputs))
            return scored[-1]

    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path / "theirs"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=2_000,
        max_steps=1,
        chat_template_kwargs={"enable_thinking": False},
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    Scripted(
        model=str(tmp_path / "model"),
        reward_funcs=listening(theirs),
        args=arguments,
        train_dataset=dataset,
        environment_factory=Lock,
    ).train()
    [batch] = scored

    config = AsyPPOConfig(
        algorithm="grpo",
        output_dir=str(tmp_path / "ours"),
        prompts_per_step=2,
        num_generations=2,
        num_mini_batches=1,
        max_completion_length=2_000,
        max_steps=1,
        sampling_logp_tolerance=1e3,  # the script's log-probs are none
        report_to=[],
        data=DataConfig(chat_template_kwargs={"enable_thinking": False}),
        environment=EnvironmentConfig(max_parallel=1, timeout=None),
    )
    trainer = AsyPPOTrainer(
        policy=str(tmp_path / "model"),
        critics=None,
        reward_funcs=listening(ours),
        train_dataset=dataset,
        config=config,
        sampler=Script(chat),
        environment_factory=Lock,
    )
    sampled = trainer.rollout(1, Timer(torch.device("cpu")))

    # What reward functions are told, messages and all, and what they give.
    assert sorted(theirs, key=str) == sorted(ours, key=str)
    assert sorted(reward for *_, reward in ours) == [0.0, 0.0, 1.0, 1.0]
    assert any(len(messages) == 7 for _, messages, _ in ours)

    # The tokens, and whose they are.
    columns = batch["completion_ids"], batch["completion_mask"].bool(), batch["tool_mask"].bool()
    expected = [(ids[kept].tolist(), own[kept].tolist()) for ids, kept, own in zip(*columns, strict=True)]
    made, found = sampled.batch, []
    for i, (start, length) in enumerate(zip(made.prompt_length.tolist(), made.response_length.tolist(), strict=True)):
        assert made.policy_tokens is not None
        found.append((made.tokens[i, start : start + length].tolist(), made.policy_tokens[i, :length].tolist()))
    assert sorted(found) == sorted(expected)
    assert trainer.step(1, sampled).metrics["actor/grad_norm"] > 0


class Task:
    """One that owns the data: ``reset`` returns the prompt."""

    def reset(self, **kwargs: Any) -> str:
        self.said = ""
        assert kwargs["prompt"] == [{"role": "user", "content": ""}]
        return "Say when."

    def when(self) -> str:
        """Say it."""
        self.said = "now"
        return self.said

    def get_reward(self) -> float:
        return float(self.said == "now")


def test_an_environment_may_own_the_data(
    chat: PreTrainedTokenizerFast,
    tiny_lm: Callable[..., Qwen3ForCausalLM],
    tiny_config: Callable[..., AsyPPOConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SAID, "Say when.", [[called("when"), "So."], ["?"]] * 2)
    config = tiny_config(algorithm="grpo", prompts_per_step=2, num_generations=2, max_completion_length=1_000)
    settings = {"critics": None, "tokenizer": chat, "config": config, "sampler": Script(chat)}

    def policy() -> Policy:
        return Policy(tiny_lm(vocab_size=len(chat), max_position_embeddings=4096), temperature=config.temperature)

    trainer = AsyPPOTrainer(policy=policy(), environment_factory=Task, **settings)
    sampled = trainer.rollout(1, Timer(torch.device("cpu")))
    assert sampled.batch.score.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert "Say when." in chat.decode(sampled.batch.tokens[0])
    with pytest.raises(ConfigError, match="train_dataset: got none, needs rows with a column environment"):
        AsyPPOTrainer(policy=policy(), environment_factory={"task": Task}, **settings)
    with pytest.raises(ConfigError, match="train_dataset: got no rows"):
        AsyPPOTrainer(policy=policy(), reward_funcs=opened, **settings)
