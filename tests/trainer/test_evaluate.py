"""Accuracy on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from asyppo.evaluate import evaluate
from asyppo.sampler import GenerateSampler

ROWS = [{"prompt": "a", "answer": "b"}, {"prompt": "cd", "answer": "e"}]
PROMPTS = [torch.tensor([3]), torch.tensor([5, 6])]


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    """1 for the answer, 0.5 for an answer in between, None for no letters at all."""
    return [None if not c else float(c == a) + 0.5 * (a in c and c != a) for c, a in zip(completions, answer)]  # noqa: B905


def run(sampler: Any, tokenizer: Any, **changes: Any) -> tuple[float, list[dict[str, Any]]]:
    """``evaluate`` with three samples a prompt."""
    options = {"num_generations": 3, "temperature": 1.0, "max_completion_length": 4, "seed": 5} | changes
    return evaluate(sampler, tokenizer, ROWS, PROMPTS, reward, **options)


def test_accuracy(scripted_sampler: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> None:
    # b: right. bb: partial credit is not right. Nothing. Then e: right, b: another prompt's answer, e: right.
    sampler = scripted_sampler([[4, 1], [4, 4], [1], [7, 1], [4, 1], [7]])
    accuracy, samples = run(sampler, tokenizer)
    assert accuracy == pytest.approx(3 / 6)
    assert [s["completion"] for s in samples] == ["b", "bb", "", "e", "b", "e"]
    assert [s["reward"] for s in samples] == [1, 0.5, 0, 1, 0, 1]
    assert [s["prompt"] for s in samples] == ["a"] * 3 + ["cd"] * 3
    assert [s["truncated"] for s in samples] == [False, True, False, False, False, True]
    assert [p.tolist() for p in sampler.calls[0]] == [[3]] * 3 + [[5, 6]] * 3


def test_the_seed_decides_and_training_does_not_notice(
    tiny_lm: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    sampler = GenerateSampler(tiny_lm(), eos_token_ids=[1], pad_token_id=0)

    def completions(**changes: Any) -> list[str]:
        return [sample["completion"] for sample in run(sampler, tokenizer, num_generations=10, **changes)[1]]

    before = torch.get_rng_state()
    first = completions()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert completions() == first
    assert completions(seed=6) != first
