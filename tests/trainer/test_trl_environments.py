"""An environment written for TRL's trainer, under TRL's trainer and under ours: the same episodes.

The class, the reward function, the rows and the arguments are what a script for ``trl.GRPOTrainer`` has; nothing in
them knows of us. What the policy says is written down, so that both trainers meet the same turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, TrainingArguments

from asyppo.config import AsyPPOConfig, ConfigError, load_config
from asyppo.from_trl import AsyPPOTrainer, adapters_of, settings_of
from asyppo.models.policy import Policy
from asyppo.rollout.samplers import Response
from asyppo.run.progress import Timer
from asyppo.trainer import AsyPPOTrainer as Trainer

trl = pytest.importorskip("trl", reason="trl is not installed")
import peft  # noqa: E402
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


def script(trainer: Callable[..., Any], model: Path, heard: Heard, **ours: Any) -> Any:
    """What a script does with ``trl.GRPOTrainer``, or with what stands in its place."""
    arguments = trl.GRPOConfig(
        output_dir=str(model.parent / "runs"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=2_000,
        max_steps=1,
        chat_template_kwargs={"enable_thinking": False},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    return trainer(
        model=str(model),
        reward_funcs=listening(heard),
        args=arguments,
        train_dataset=Dataset.from_dict(ROWS),
        environment_factory=Lock,
        **ours,
    )


@pytest.mark.slow
def test_a_script_of_trls_plays_the_same_episodes(
    chat: PreTrainedTokenizerFast, tiny_lm: Callable[..., Qwen3ForCausalLM], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    tiny_lm(vocab_size=len(chat), max_position_embeddings=4096).save_pretrained(model)
    chat.save_pretrained(model)
    theirs: Heard = []
    ours: Heard = []
    says, scored = Script(chat), []

    class Scripted(trl.GRPOTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            return [says.next(ids) for ids in prompt_ids], None

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            scored.append(super()._generate_and_score_completions(inputs))
            return scored[-1]

    script(Scripted, model, theirs).train()
    [batch] = scored

    settings = {"sampling_logp_tolerance": 1e3}  # the script's log-probs are none
    trainer = script(AsyPPOTrainer, model, ours, sampler=Script(chat), settings=settings)
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
    metrics = trainer.step(1, sampled).metrics
    assert metrics["actor/grad_norm"] > 0
    assert metrics["critic/vf_loss"] > 0


def test_what_arguments_come_to(tmp_path: Path) -> None:
    def made(**changes: Any) -> dict[str, Any]:
        return settings_of(trl.GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **{"bf16": False} | changes), 100)

    usual = load_config(made())
    # 8 responses a step, one update; three passes over the rows.
    assert (usual.prompts_per_step, usual.num_generations, usual.num_mini_batches, usual.max_steps) == (1, 8, 1, 300)
    assert (usual.learning_rate, usual.epsilon, usual.epsilon_high, usual.beta) == (1e-6, 0.2, 0.2, 0.0)
    assert (usual.lr_scheduler_type, usual.loss_aggregation, usual.save_steps) == ("linear", "token-mean", 500)
    assert (usual.eval.every, usual.environment.max_turns, usual.policy.gradient_checkpointing) == (0, 513, True)
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 8}
    updates = {"max_steps": 80, "num_iterations": 2, "save_steps": 40, "warmup_steps": 9}
    several = load_config(made(**batches, **updates, max_tool_calling_iterations=3, loss_type="grpo"))
    assert (several.prompts_per_step, several.num_mini_batches, several.num_iterations) == (4, 4, 2)
    assert (several.max_steps, several.save_steps, several.warmup_steps) == (10, 5, 2)
    assert (several.environment.max_turns, several.loss_aggregation) == (4, "sequence-mean")
    parts = load_config(made(max_steps=50, warmup_steps=0.1, save_steps=0.2, eval_strategy="epoch"))
    assert (parts.warmup_steps, parts.save_steps, parts.eval.every) == (5, 10, 100)
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://there:8000"}
    vllm = load_config(made(**server))
    assert (vllm.sampler, vllm.vllm.url, vllm.importance_sampling_clip_max) == ("vllm", ["http://there:8000"], 3.0)
    optimizers = {name: load_config(made(optim=name)).optim for name in ("adamw_torch", "adamw_bnb_8bit")}
    assert (usual.optim, optimizers) == ("adamw", {"adamw_torch": "adamw", "adamw_bnb_8bit": "adamw_8bit"})
    for changes, message in (
        ({"optim": "sgd"}, r"^args.optim: got 'sgd', needs one of adamw_torch_fused, adamw_torch, adamw_8bit, "),
        ({"top_p": 0.9}, r"^args.top_p: got 0.9, needs 1.0: there is no such setting$"),
        ({"loss_type": "sapo"}, r"^args.loss_type: got 'sapo', needs one of dapo, bnpo, grpo$"),
        (
            {"gradient_accumulation_steps": 8, "steps_per_generation": 4},
            r"^args.gradient_.*: got 8, needs a divisor of",
        ),
        ({"model_init_kwargs": {"device_map": "auto"}}, r"^args.model_init_kwargs: .* attn_implementation and dtype"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(**changes)
    with pytest.raises(
        ConfigError, match=r"^args: got TrainingArguments without beta, needs a GRPOConfig of TRL 1.16$"
    ):
        settings_of(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), 100)
    adapters = adapters_of(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    assert adapters == {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj"]}
    for name, value in (("use_rslora", True), ("lora_dropout", 0.1), ("modules_to_save", ["lm_head"])):
        with pytest.raises(ConfigError, match=rf"^peft_config.{name}: got .*, needs .*: there is no such setting$"):
            adapters_of(peft.LoraConfig(target_modules="all-linear", **{name: value}))
    with pytest.raises(ConfigError, match=r"^peft_config.target_modules: got None, needs a list of names, or all-"):
        adapters_of(peft.LoraConfig())  # peft's own choice by family is another than ours
    with pytest.raises(ConfigError, match=r"^peft_config: got PROMPT_TUNING, needs a LoraConfig$"):
        adapters_of(peft.PromptTuningConfig(num_virtual_tokens=2))


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

    trainer = Trainer(policy=policy(), environment_factory=Task, **settings)
    sampled = trainer.rollout(1, Timer(torch.device("cpu")))
    assert sampled.batch.score.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert "Say when." in chat.decode(sampled.batch.tokens[0])
    with pytest.raises(ConfigError, match="train_dataset: got none, needs rows with a column environment"):
        Trainer(policy=policy(), environment_factory={"task": Task}, **settings)
    with pytest.raises(ConfigError, match="train_dataset: got no rows"):
        Trainer(policy=policy(), reward_funcs=opened, **settings)
