"""Reward functions and what may come back from them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from asyppo.config import ConfigError, DataConfig, TaskConfig
from asyppo.data import load_eval_rows
from asyppo.rewards import RewardError, compute_rewards, extract_answer, resolve_reward_funcs

ROWS = [{"prompt": "p", "answer": "1", "extra": "x"}, {"prompt": "q", "answer": "2", "extra": "y"}]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>7</answer>", "7"),
        ("3, <answer> 7 </answer> and more", "7"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        (" 42\n", "42"),
        ("<answer>unfinished", "<answer>unfinished"),
        ("", ""),
    ],
)
def test_extract_answer(completion: str, answer: str) -> None:
    assert extract_answer(completion) == answer


def test_reasoning_gym_scores_the_extracted_answer() -> None:
    rows = load_eval_rows(DataConfig(task=TaskConfig("chain_sum"), eval_size=2))
    completions = [f"thinking <answer>{rows[0]['answer']}</answer>", "<answer>no number</answer>"]
    [rewards] = compute_rewards(resolve_reward_funcs(["reasoning_gym"]), rows, completions)
    assert rewards[0] == 1
    assert rewards[1] < 1


def test_exact_match() -> None:
    assert compute_rewards(resolve_reward_funcs(["exact_match"]), ROWS, ["<answer>1</answer>", "3"]) == [[1.0, 0.0]]


def test_functions_get_prompts_completions_and_columns() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [None, 2]

    def other(completions: list[str], **_: Any) -> list[float | None]:
        return [float(len(c)) for c in completions]

    assert compute_rewards([reward, other], ROWS, ["a", "bc"]) == [[0.0, 2.0], [1.0, 2.0]]  # None is "not mine"
    assert seen == {"prompts": ["p", "q"], "completions": ["a", "bc"], "answer": ["1", "2"], "extra": ["x", "y"]}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named_with_its_sample(bad: float) -> None:
    def broken(**_: Any) -> list[float | None]:
        return [1.0, bad]

    with pytest.raises(RewardError, match=r"broken: returned (nan|-?inf) for sample 1 \('q'\)"):
        compute_rewards([broken], ROWS, ["a", "b"])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_rewards(count: int) -> None:
    def broken(**_: Any) -> list[float | None]:
        return [1.0] * count

    with pytest.raises(RewardError, match=f"broken: returned {count} rewards, needs 2"):
        compute_rewards([broken], ROWS, ["a", "b"])


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match="reward_funcs: got 'nope', needs one of reasoning_gym, exact_match"):
        resolve_reward_funcs(["nope"])
