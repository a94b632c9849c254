"""Prompts: held-out ones stay held out, and a step's prompts are a function of its number."""

from __future__ import annotations

import pytest

from asyppo.config import ConfigError, DataConfig, TaskConfig
from asyppo.data import PromptSchedule, load_eval_rows, load_train_rows

SUM = TaskConfig("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})


def test_held_out_prompts_are_never_trained_on() -> None:
    # The generator's row i is Random(seed + i), so these seeds make the same rows but for the first ten.
    config = DataConfig(task=SUM, train_size=40, train_seed=1, eval_size=30, eval_seed=11)
    held_out = load_eval_rows(config)
    train = load_train_rows(config, held_out)
    assert (len(held_out), len(train)) == (30, 40)
    held_out_prompts, train_prompts = ({row["prompt"] for row in rows} for rows in (held_out, train))
    assert (len(held_out_prompts), len(train_prompts)) == (30, 40)  # all different
    assert not held_out_prompts & train_prompts
    alone = {row["prompt"] for row in load_train_rows(config, [])}
    assert held_out_prompts & alone  # there was something to leave out


def test_rows_carry_the_task_and_end_with_the_suffix() -> None:
    [row] = load_eval_rows(DataConfig(task=SUM, eval_size=1, prompt_suffix=" =>"))
    assert row["prompt"] == row["entry"]["question"] + " =>"
    assert row["answer"] == row["entry"]["answer"]
    left, sign, right = row["entry"]["metadata"]["expression"].split()
    assert int(row["answer"]) == int(left) + (1 if sign == "+" else -1) * int(right)


def test_rows_are_a_function_of_the_seed() -> None:
    def prompts(seed: int) -> list[str]:
        return [row["prompt"] for row in load_eval_rows(DataConfig(task=SUM, eval_size=5, eval_seed=seed))]

    assert prompts(3) == prompts(3) != prompts(300)


def test_too_small_a_task() -> None:
    config = DataConfig(task=SUM, train_size=500)  # there are fewer than 2 * 81 different sums
    with pytest.raises(ConfigError, match=r"data\.task: 'chain_sum' .* has only \d+ .* needs 500"):
        load_train_rows(config, [])


@pytest.mark.parametrize(
    "task", [TaskConfig("no_such_task"), TaskConfig("chain_sum", {"min_terms": 0}), TaskConfig("chain_sum", {"x": 1})]
)
def test_a_task_that_cannot_be_made(task: TaskConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.task: got"):
        load_eval_rows(DataConfig(task=task, eval_size=1))


def test_schedule_passes_over_all_rows_before_any_repeats() -> None:
    schedule = PromptSchedule(num_rows=10, prompts_per_step=4, seed=0)
    drawn = [i for step in range(5) for i in schedule.rows_of_step(step)]  # two passes
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert drawn[:10] != list(range(10))


def test_schedule_is_a_function_of_seed_and_step() -> None:
    schedule = PromptSchedule(num_rows=10, prompts_per_step=4, seed=0)
    late_first = [schedule.rows_of_step(step) for step in (7, 2, 7, 0)]
    fresh = PromptSchedule(num_rows=10, prompts_per_step=4, seed=0)
    assert late_first == [fresh.rows_of_step(step) for step in (7, 2, 7, 0)]
    assert PromptSchedule(10, 4, seed=1).rows_of_step(0) != fresh.rows_of_step(0)


def test_schedule_of_more_prompts_than_rows() -> None:
    rows = PromptSchedule(num_rows=3, prompts_per_step=8, seed=0).rows_of_step(0)
    assert len(rows) == 8
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]


def test_schedule_needs_rows() -> None:
    with pytest.raises(ConfigError, match="training rows"):
        PromptSchedule(0, 4, seed=0)
