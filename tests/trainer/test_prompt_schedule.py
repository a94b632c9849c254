"""The rows of a step, and the order of a pass over all of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from asyppo.config import ConfigError
from asyppo.data.rows import Kept
from asyppo.data.schedule import Permutation, PromptSchedule


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


# --- the order of a pass ---


@pytest.mark.parametrize("count", [*range(1, 40), 63, 64, 65, 1000, 4099])
def test_a_permutation_is_a_bijection(count: int) -> None:
    for key in ("a", "b"):
        numbers = Permutation(count, key)(np.arange(count))
        assert sorted(numbers.tolist()) == list(range(count))
    assert count < 8 or (numbers != Permutation(count, "a")(np.arange(count))).any()


def test_all_permutations_come_alike_often() -> None:
    """Chi-square over the 24 of four numbers, each expected 60 times: above 60 in one of 30,000 draws."""
    drawn = Counter(tuple(Permutation(4, f"pass {i}")(np.arange(4)).tolist()) for i in range(24 * 60))
    assert len(drawn) == 24
    assert sum((n - 60) ** 2 / 60 for n in drawn.values()) < 60


def test_a_step_of_many_rows_takes_no_memory() -> None:
    import tracemalloc

    schedule = PromptSchedule(10**12, 64, seed=0)
    tracemalloc.start()
    rows = schedule.rows_of_step(10**9)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert len(set(rows)) == 64
    assert max(rows) > 10**11


def test_numbers_without_some() -> None:
    for left_out in ([], [0], [9], [0, 1, 2], [2, 3, 7, 9], list(range(10))):
        kept = Kept(10, left_out)
        assert list(kept) == [i for i in range(10) if i not in left_out]
        assert kept[1:3] == list(kept)[1:3]
    with pytest.raises(IndexError):
        Kept(3, [1])[2]
