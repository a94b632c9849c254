"""What ``asyppo plan`` says of each phase of a step, against what was alive in it at the most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForTokenClassification

from asyppo.cli.plan import estimate, make_plan
from asyppo.config import AsyPPOConfig, CriticConfig, PolicyConfig
from asyppo.models import offload
from asyppo.models.critics import Critics, LoraCritics, make_critics
from asyppo.trainer import AsyPPOTrainer
from tests.trainer.accounting import DEVICE, accounting
from tests.trainer.distributed_rank import policy, shape
from tests.trainer.test_offload import PromptLane, with_a_gpu

PHASES = {
    "generation": ["gen"],
    "log-probs": ["old_log_prob", "ref"],
    "critic update": ["update_critic"],
    "values": ["values"],
    "policy update": ["update_actor"],
}
"""Of the plan, as the trainer's timer calls them."""
WORDS, PROMPT, RANK, LOT = 1000, 8, 4, 2**18
LAYERS = {
    "vocab_size": WORDS,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
    "tie_word_embeddings": True,
}


@dataclass
class Case:
    """Settings of a run."""

    policy: dict[str, Any] = field(default_factory=dict)
    critic: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    further_off: tuple[str, ...] = ()
    """Phases of which docs/scaling.md says how far."""

    def config(self) -> AsyPPOConfig:
        """Two micro-batches an update, so that gradients of one are there while the other goes forward."""
        common: dict[str, Any] = {
            "prompts_per_step": 2,
            "num_generations": 4,
            "max_completion_length": 32,
            "max_tokens_per_micro_batch": 4 * (PROMPT + 32),
            "num_mini_batches": 1,
            "old_per_token_logps": "compute",
            "sampler": "generate",
            "generation_batch_size": 8,
        }
        return AsyPPOConfig(
            **common | self.own,
            policy=PolicyConfig(**{"packing": False, "dtype": "float32"} | self.policy),
            critic=CriticConfig(**{"num_mini_batches": 1} | self.critic),
        )


CASES = {
    "float32": Case(),
    "bfloat16": Case({"dtype": "bfloat16"}),
    # What is trained is little, and what critics keep in a pass most of what is there.
    "LoRA": Case(
        {"dtype": "bfloat16", "use_peft": True, "lora_r": 2}, {"lora_r": RANK}, further_off=("critic update",)
    ),
    "moments in the host's memory": Case(own={"offload": "optimizer", "beta": 0.1}),
    "checkpointing": Case({"dtype": "bfloat16", "gradient_checkpointing": True}, {"gradient_checkpointing": True}),
}


def words() -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(WORDS - 3))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def critics_of(config: AsyPPOConfig, dtype: torch.dtype) -> Critics:
    made = [Qwen3ForTokenClassification(critic_shape()) for _ in range(config.num_critics)]
    if config.critic.lora_r:
        return LoraCritics(made[0], [model.score for model in made], r=RANK, alpha=4, dtype=dtype)
    return make_critics(made, config.critic, dtype=dtype)


def critic_shape() -> Qwen3Config:
    return Qwen3Config(**shape(**LAYERS, num_labels=1), classifier_dropout=0.0)


def measured(config: AsyPPOConfig) -> dict[str, int]:
    """The most bytes that are alive on the device in each phase of a step that has moments already."""
    dtype = getattr(torch, config.policy.dtype)
    checkpointing = config.policy.gradient_checkpointing
    model = policy(dtype, lora=config.policy.use_peft, gradient_checkpointing=checkpointing, **LAYERS)
    critics = critics_of(config, dtype)
    rows = [{"prompt": " ".join(f"w{PROMPT * i + j}" for j in range(PROMPT))} for i in range(8)]
    moves = config.offload != "none"
    with with_a_gpu(PromptLane) if moves else accounting() as accounts, patch.object(offload, "LOT_BYTES", LOT):
        trainer = AsyPPOTrainer(
            policy=model,
            critics=critics,
            tokenizer=words(),
            reward_funcs=[lambda completions, **_: [float(len(text) % 7) for text in completions]],
            train_dataset=rows,
            config=config,
        )
        accounts.name("weights", [*trainer.policy.parameters(), *critics.parameters()])
        assert trainer.critic_optimizer is not None
        for optimizer in (trainer.policy_optimizer, trainer.critic_optimizer.adamw):
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                parameter.grad = torch.zeros_like(parameter)
            trainer.offload.step(optimizer)
            optimizer.zero_grad()
        trainer.step(1)
        trainer.offload.recall()
    return {
        phase: max(accounts.peak[name][DEVICE] for name in names if name in accounts.peak)
        for phase, names in PHASES.items()
    }


def estimated(config: AsyPPOConfig) -> dict[str, dict[str, int]]:
    shapes = {
        "policy_config": lambda _: ("policy", "", Qwen3Config(**shape(**LAYERS))),
        "critic_config": lambda _: ("critic", "", critic_shape()),
        "LOT_BYTES": LOT,
    }
    with patch.multiple(estimate, **shapes):
        return make_plan(config, prompt_length=PROMPT, device="cpu").phases


@pytest.mark.parametrize(
    "name", [name if name == "float32" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_plan_is_within_a_tenth_of_what_is_alive(name: str) -> None:
    case = CASES[name]
    config = case.config()
    plan, found = estimated(config), measured(config)
    for phase in found.keys() - set(case.further_off):
        assert sum(plan[phase].values()) == pytest.approx(found[phase], rel=0.1), phase
