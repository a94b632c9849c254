"""Accuracy on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from asyppo.data import Row, prompt_text
from asyppo.rewards import RewardFunc, RewardFunction, compute_rewards
from asyppo.sampler import Sampler


def evaluate(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    prompts: Sequence[Tensor],
    reward_func: RewardFunc | RewardFunction,
    *,
    num_generations: int,
    temperature: float,
    max_completion_length: int,
    seed: int,
) -> tuple[float, list[dict[str, Any]]]:
    """Sample ``num_generations`` responses a prompt and return the fraction that is right, and every sample.

    Right is a reward of 1 from ``reward_func``. Torch's generator is seeded with ``seed`` and put back afterwards, so
    evaluations compare like with like and training does not notice them.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        responses = sampler.sample(
            [prompt for prompt in prompts for _ in range(num_generations)],
            max_completion_length=max_completion_length,
            temperature=temperature,
        )
    repeated = [row for row in rows for _ in range(num_generations)]
    completions = tokenizer.batch_decode([r.tokens for r in responses], skip_special_tokens=True)
    ids = [response.tokens.tolist() for response in responses]
    rewards = compute_rewards([reward_func], repeated, completions, ids).scores
    samples = [
        {
            "prompt": prompt_text(row["prompt"]),
            "completion": completion,
            "reward": reward,
            "truncated": response.truncated,
        }
        for row, completion, reward, response in zip(repeated, completions, rewards, responses, strict=True)
    ]
    return sum(reward >= 1 for reward in rewards) / len(rewards), samples
