"""A step whose tensors are on a device without numbers: none meets one of another device, and no micro-batch makes the
host wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedTokenizerFast

from asyppo.cli.main import parse
from asyppo.cli.plan import known_shape
from asyppo.config import AsyPPOConfig, SideConfig
from asyppo.models.critics import make_critics
from asyppo.models.policy import Policy
from asyppo.trainer import AsyPPOTrainer
from tests.trainer.pretend_gpu import GPU, pretended_gpu

Make = Callable[..., Any]


def likes_a(completions: list[str], **_: Any) -> list[float]:
    return [c.count("a") + 0.1 * len(c) for c in completions]


def steps(config: AsyPPOConfig, policy: Any, critics: list[Any], budgets: list[int], **kw: Any) -> list[list[str]]:
    """Take a step for each budget of tokens, of models made on the device, and return who read from it in each."""
    found = []
    with pretended_gpu() as gpu:
        with torch.device(GPU):
            made = Policy(
                policy().eval(), dtype=torch.bfloat16, gradient_checkpointing=config.policy.gradient_checkpointing
            )
            value_models = [make().eval() for make in critics]
        trainer = AsyPPOTrainer(
            policy=made,
            critics=make_critics(value_models, config.critic, dtype=torch.bfloat16) if critics else None,
            reward_funcs=[likes_a],
            config=config,
            **kw,
        )
        for budget in budgets:
            trainer.config = replace(config, max_tokens_per_micro_batch=budget)
            gpu.reads.clear()
            result = trainer.step(1)
            assert result.metrics["actor/skipped_updates"] == 0
            found.append(list(gpu.reads))
    return found


@pytest.mark.parametrize(
    ("critic", "packing"),
    [
        ({}, True),
        ({"stacked": False}, False),
        pytest.param({"kind": "side", "policy_inputs": ["entropy"]}, True, marks=pytest.mark.slow),
        pytest.param({"kind": "side", "side": SideConfig("mlp", keep_bytes=0)}, False, marks=pytest.mark.slow),
    ],
)
def test_no_micro_batch_makes_the_host_wait(
    tiny_config: Make,
    tiny_lm: Make,
    tiny_critic: Make,
    scripted_sampler: Make,
    make_responses: Make,
    prompts: list,
    tokenizer: PreTrainedTokenizerFast,
    critic: dict[str, Any],
    packing: bool,
) -> None:
    config = tiny_config(critic=critic, prompts_per_step=2, max_completion_length=12)
    config.policy.packing = packing
    few, many = steps(
        config,
        partial(tiny_lm, num_hidden_layers=1),
        [] if "kind" in critic else [tiny_critic, tiny_critic],
        [10_000, 50],
        tokenizer=tokenizer,
        sampler=scripted_sampler(make_responses(12, 12)),
        train_dataset=prompts,
    )
    assert many == few


@pytest.mark.slow
def test_a_step_of_the_papers_configuration(
    scripted_sampler: Make, make_responses: Make, prompts: list, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As ``--config qwen3-4b`` sets it, its whole batch, but for two layers of each model and for the sampling:
    responses are given, short ones."""
    config = parse(["train", "--config", "qwen3-4b"])
    shapes = [
        known_shape(name) for name in (config.policy.model_name_or_path, config.critic.model_name_or_path) if name
    ]
    shapes[1].num_labels, shapes[1].classifier_dropout = 1, 0.0
    for shape in shapes:
        shape.num_hidden_layers, shape.layer_types = 2, shape.layer_types[:2]
    reads = steps(
        config,
        lambda: AutoModelForCausalLM.from_config(shapes[0]),
        [lambda: AutoModelForTokenClassification.from_config(shapes[1])] * config.num_critics,
        [config.max_tokens_per_micro_batch],
        tokenizer=tokenizer,
        sampler=scripted_sampler(make_responses(256, 100)),
        train_dataset=[row | {"prompt": row["prompt"] * (1 + i // 8)} for i, row in enumerate(prompts * 8)],
    )
    assert reads
