"""Dynamic sampling: which groups a step keeps, by hand, in the loop and after a restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.data.rows import Row
from asyppo.rollout.collecting import Group, Sample, keep_unequal
from asyppo.rollout.samplers import Response

Make = Callable[..., Any]


def group(name: str, *scores: float) -> Group:
    """One with these rewards."""
    response = Response(torch.tensor([1]), torch.zeros(1), truncated=False)
    return [Sample({"prompt": name}, torch.tensor([3]), response, "", {"r": s}, s) for s in scores]


def script(*batches: list[Group]) -> tuple[Any, list[tuple[int, int]]]:
    """A draw that returns these batches, and what it was asked for."""
    asked: list[tuple[int, int]] = []

    def draw(batch: int, count: int) -> list[Group]:
        asked.append((batch, count))
        return batches[batch][:count]

    return draw, asked


def names(groups: list[Group]) -> list[str]:
    """Of the prompts."""
    return [g[0].row["prompt"] for g in groups]


def test_until_there_are_enough() -> None:
    draw, asked = script(
        [group("a", 0, 0), group("b", 0, 1), group("c", 1, 1)],
        [group("d", 1, 0), group("e", 0, 0)],
        [group("f", 0.5, 1)],
        [group("never", 0, 1)],
    )
    groups, row = keep_unequal(draw, 3, 10)
    assert names(groups) == ["b", "d", "f"]
    assert asked == [(0, 3), (1, 2), (2, 1)]  # what is missing, and no more
    assert row == {
        "sampling/num_gen_batches": 3,
        "sampling/equal_groups_frac": 3 / 6,
        "sampling/filled_groups": 0,
    }


def test_the_first_batch_may_do() -> None:
    draw, asked = script([group("a", 0, 1)])
    assert names(keep_unequal(draw, 1, 10)[0]) == ["a"]
    assert asked == [(0, 1)]


def test_what_is_missing_is_filled_up() -> None:
    draw, asked = script([group("a", 0, 0), group("b", 1, 1)], [group("c", 0, 1), group("d", 0, 0)])
    groups, row = keep_unequal(draw, 2, 2)
    assert names(groups) == ["c", "a"]
    assert len(asked) == 2
    assert row["sampling/filled_groups"] == 1
    assert row["sampling/equal_groups_frac"] == 3 / 4


ROWS: list[Row] = [{"prompt": text, "easy": i % 2 == 0} for i, text in enumerate("abcdefgh")]


def hard_ones_differ(completions: list[str], easy: list[bool], **_: Any) -> list[float]:
    """1 for every response to an easy prompt; for the others 0 and 1 by turns."""
    return [1.0 if is_easy else float(i % 2) for i, is_easy in enumerate(easy)]


@pytest.mark.parametrize("algorithm", ["asyppo", "grpo"])
def test_in_the_loop_and_from_any_step(tiny_config: Make, tiny_trainer: Make, algorithm: Any) -> None:
    seen: list[list[Tensor]] = []
    for start in (1, 2):
        config = tiny_config(algorithm=algorithm, dynamic_sampling=True, run_name=f"run-{start}", learning_rate=1e-12)
        trainer = tiny_trainer(config, hard_ones_differ, train_dataset=ROWS)
        for step in range(start, 3):
            asked: list[Tensor] = []
            sample = trainer.sampler.sample

            def spy(prompts: list[Tensor], to: Any = sample, into: Any = asked, **options: Any) -> Any:
                into += prompts
                return to(prompts, **options)

            trainer.sampler.sample = spy
            row = trainer.step(step).metrics
            trainer.sampler.sample = sample
        seen.append(asked)
        assert row["sampling/num_gen_batches"] > 1
        assert row["sampling/filled_groups"] == 0
        assert 0 < row["sampling/equal_groups_frac"] < 1
        assert row["critic/score/mean"] == 0.5  # of hard prompts only
    # Step 2 asks for the same prompts whether or not step 1 came before it.
    assert len(seen[0]) == len(seen[1]) > 12
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_further_prompts_leave_those_of_the_steps_alone(tiny_config: Make, tiny_trainer: Make) -> None:
    def make(dynamic_sampling: bool) -> Any:
        return tiny_trainer(tiny_config(dynamic_sampling=dynamic_sampling), hard_ones_differ, train_dataset=ROWS)

    own = [[make(on).rollout._rows_of_batch(step, 0) for step in (1, 2, 3)] for on in (False, True)]
    assert own[0] == own[1]
    trainer = make(True)
    further = [tuple(trainer.rollout._rows_of_batch(step, batch)) for step in (1, 2, 3) for batch in (1, 2, 3)]
    assert len(set(further)) > 6


def test_rewards_that_are_always_equal(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config(dynamic_sampling=True, dynamic_sampling_max_batches=3)
    trainer = tiny_trainer(config, lambda completions, **_: [1.0] * len(completions))
    row = trainer.step(1).metrics
    assert (row["sampling/num_gen_batches"], row["sampling/filled_groups"]) == (3, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dynamic_sampling_max_batches": 0}, "dynamic_sampling_max_batches: got 0, needs an integer of at least 1"),
        (
            {"dynamic_sampling": True, "num_generations": 1, "algorithm": "ppo"},
            "dynamic_sampling: got True, needs num_generations of at least 2",
        ),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AsyPPOConfig(**settings).validate()
