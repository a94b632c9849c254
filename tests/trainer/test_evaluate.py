"""Accuracy on held-out prompts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from asyppo.data.rows import Row
from asyppo.evaluate import Evaluation, clustered_estimate, evaluate, pass_at_k
from asyppo.rollout.samplers import GenerateSampler

ROWS: list[Row] = [{"prompt": "a", "answer": "b"}, {"prompt": "cd", "answer": "e"}]
PROMPTS = [torch.tensor([3]), torch.tensor([5, 6])]


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    """1 for the answer, 0.5 for an answer in between, None for no letters at all."""
    return [None if not c else float(c == a) + 0.5 * (a in c and c != a) for c, a in zip(completions, answer)]  # noqa: B905


@pytest.fixture
def run(tokenizer: PreTrainedTokenizerFast, tiny_config: Callable[..., Any]) -> Callable[..., Evaluation]:
    """``evaluate`` with three samples a prompt."""

    def evaluated(
        sampler: Any,
        num_generations: int = 3,
        seed: int = 5,
        rows: list[Row] = ROWS,
        reward_funcs: Any = None,
        **kw: Any,
    ) -> Any:
        fields = {"max_completion_length": 4, "generation_batch_size": 4}
        config = tiny_config(evaluation={"num_generations": num_generations}, **fields)
        config.data.eval_seed = seed
        return evaluate(sampler, tokenizer, rows, PROMPTS, reward_funcs or [reward], config, **kw)

    return evaluated


# b: right. bb: partial credit is not right. Nothing. Then e: right, b: another prompt's answer, e: right.
SIX = [[4, 1], [4, 4], [1], [7, 1], [4, 1], [7]]


def test_which_are_right(run: Callable[..., Evaluation], scripted_sampler: Callable[..., Any]) -> None:
    # The sampler gets a few responses at a time, and starts over: 4 and then 2.
    sampler = scripted_sampler(SIX)
    drawn = iter(sampler.responses)
    sampler.sample = lambda prompts, **_: [sampler.calls.append(p) or next(drawn) for p in prompts]
    counts: list[int] = []
    result = run(sampler, progress=counts.append)
    assert result.right == [[True, False, False], [True, False, True]]
    assert result.accuracy == pytest.approx(3 / 6)
    assert [s["completion"] for s in result.samples] == ["b", "bb", "", "e", "b", "e"]
    assert [s["reward"] for s in result.samples] == [1, 0.5, 0, 1, 0, 1]
    assert [s["prompt"] for s in result.samples] == ["a"] * 3 + ["cd"] * 3
    assert [s["truncated"] for s in result.samples] == [False, True, False, False, False, True]
    assert [s["response_length"] for s in result.samples] == [2, 2, 1, 2, 2, 1]
    assert [p.tolist() for p in sampler.calls] == [[3]] * 3 + [[5, 6]] * 3
    assert counts == [4, 2]


def test_metrics_by_task(run: Callable[..., Evaluation], scripted_sampler: Callable[..., Any]) -> None:
    result = run(scripted_sampler(SIX[:3]), rows=[ROWS[0] | {"task": "x"}, ROWS[1] | {"task": "y", "answer": "b"}])
    metrics = result.metrics()
    assert metrics.pop("eval/accuracy/ci_low") < metrics["eval/accuracy"] < metrics.pop("eval/accuracy/ci_high")
    assert result.right == [[True, False, False], [True, True, False]]
    assert metrics == pytest.approx(
        {
            "eval/accuracy": 1 / 2,
            "eval/pass@2": (2 / 3 + 1) / 2,  # of the first prompt's three pairs two have the right response
            "eval/pass@3": 1.0,
            "eval/x/accuracy": 1 / 3,
            "eval/y/accuracy": 2 / 3,
            "eval/response_length/mean": 11 / 6,
            "eval/response_length/clip_ratio": 1 / 3,
        }
    )
    results = result.results()
    assert results["tasks"]["x"]["prompts"] == 1
    assert results["all"]["pass@2"]["value"] == pytest.approx(5 / 6)
    lines = result.table().splitlines()
    assert [line.split()[0] for line in lines] == ["task", "x", "y", "all"]
    assert lines[0].split() == ["task", "prompts", "avg@3", "pass@2", "pass@3", "response_length", "truncated"]
    assert "0.3333 [" in lines[1]


@pytest.mark.parametrize(
    ("task", "name"),
    [(None, "other"), ("", "other"), ("other", "other"), (["a", 1], '["a", 1]'), ({"b": 1}, '{"b": 1}'), (3, "3")],
)
def test_a_task_of_any_value(
    run: Callable[..., Evaluation], scripted_sampler: Callable[..., Any], task: Any, name: str
) -> None:
    """A task that is null is one of its own, not all of them."""
    result = run(scripted_sampler(SIX[:3]), rows=[ROWS[0] | {"task": task}, ROWS[1] | {"task": "y"}])
    metrics = result.metrics()
    assert (metrics[f"eval/{name}/accuracy"], metrics["eval/y/accuracy"]) == pytest.approx((1 / 3, 0))
    assert result.results()["tasks"][name]["prompts"] == 1
    assert result.samples[0]["task"] == name


def test_the_first_function_with_a_reward_decides(
    run: Callable[..., Evaluation], scripted_sampler: Callable[..., Any]
) -> None:
    """As in a mixture, where each function has rewards for rows of its own."""

    def of_the_second(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        return [float(c == "b") if a == "e" else None for c, a in zip(completions, answer, strict=True)]

    def always(completions: list[str], **_: Any) -> list[float | None]:
        return [1.0] * len(completions)

    result = run(scripted_sampler([[4, 1]]), reward_funcs=[of_the_second, reward, always])
    assert result.right == [[True] * 3, [True] * 3]
    result = run(scripted_sampler([[7, 1]]), reward_funcs=[of_the_second, reward, always])
    assert result.right == [[False] * 3, [False] * 3]  # the second prompt's would be right by the other function
    assert result.samples[3]["rewards"] == {"of_the_second": 0.0, "reward": 1.0, "always": 1.0}
    assert result.samples[3]["reward"] == 2.0


def test_one_task_has_no_row_of_its_own(run: Callable[..., Evaluation], scripted_sampler: Callable[..., Any]) -> None:
    result = run(scripted_sampler(SIX), num_generations=1)
    assert [key for key in result.metrics() if "pass" in key] == []
    assert result.task_names() == []
    assert [line.split()[0] for line in result.table().splitlines()] == ["task", "all"]


def test_the_seed_decides_and_training_does_not_notice(
    run: Callable[..., Evaluation], tiny_lm: Callable[..., Any]
) -> None:
    sampler = GenerateSampler(tiny_lm(), eos_token_ids=[1], pad_token_id=0)

    def completions(**changes: Any) -> list[str]:
        return [sample["completion"] for sample in run(sampler, num_generations=10, **changes).samples]

    before = torch.get_rng_state()
    first = completions()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert completions() == first
    assert completions(seed=6) != first


def test_a_few_batches_at_a_time_draw_what_one_call_draws(
    tokenizer: PreTrainedTokenizerFast, tiny_config: Callable[..., Any], tiny_lm: Callable[..., Any]
) -> None:
    """Progress is shown in between; what is sampled is what the sampler draws from all prompts at once."""
    config = tiny_config(evaluation={"num_generations": 7}, max_completion_length=4, generation_batch_size=2)
    prompts = [torch.tensor([3, 4]), torch.tensor([5]), torch.tensor([6, 7])]
    rows = [{"prompt": text, "answer": "b"} for text in ("ab", "c", "de")]
    sampler = GenerateSampler(tiny_lm(), eos_token_ids=[1], pad_token_id=0, batch_size=2)
    counts: list[int] = []
    result = evaluate(sampler, tokenizer, rows, prompts, [reward], config, progress=counts.append)
    assert len(counts) == 11
    assert sum(counts) == 21
    torch.manual_seed(config.data.eval_seed)
    at_once = sampler.sample([p for p in prompts for _ in range(7)], max_completion_length=4, temperature=1.0)
    texts = tokenizer.batch_decode([r.tokens for r in at_once], skip_special_tokens=True)
    assert [s["completion"] for s in result.samples] == texts


@pytest.mark.parametrize(("n", "right"), [(4, 0), (4, 1), (4, 3), (4, 4), (6, 2)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, right: int) -> None:
    responses = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        draws = [any(draw) for draw in itertools.combinations(responses, k)]
        assert pass_at_k(n, right, k) == pytest.approx(sum(draws) / len(draws))


@pytest.mark.parametrize("spread", [0.3, 2.0, 50.0])
@pytest.mark.parametrize("mean", [0.1, 0.5, 0.97])
def test_intervals_hold_the_truth_as_often_as_they_say(spread: float, mean: float) -> None:
    """Prompts differ in difficulty (beta-distributed, alike for a large ``spread``); 4 responses to each of 100."""
    rng = random.Random(0)

    def covers() -> tuple[bool, bool]:
        scores = []
        for _ in range(100):
            p = rng.betavariate(mean * spread, (1 - mean) * spread)
            scores.append(sum(rng.random() < p for _ in range(4)) / 4)
        clustered = clustered_estimate(scores, 4)
        naive = clustered_estimate([float(i < round(4 * sum(scores))) for i in range(400)], 1)
        return clustered.low <= mean <= clustered.high, naive.low <= mean <= naive.high

    results = [covers() for _ in range(500)]
    clustered, naive = (sum(column) / len(results) for column in zip(*results, strict=True))
    assert 0.9 <= clustered <= 0.985
    if spread < 1:  # responses to one prompt are alike: counting each for itself promises too much
        assert naive < 0.85


def test_intervals_at_the_ends() -> None:
    """Where all are right, or none, there is still doubt."""
    none, every = clustered_estimate([0.0] * 50, 4), clustered_estimate([1.0] * 50, 4)
    assert none.value == none.low == 0
    assert 0.05 < none.high < 0.1
    assert every.high == every.value == 1
    assert every.low == pytest.approx(1 - none.high)
    one = clustered_estimate([0.5], 4)
    assert 0 < one.low < 0.5 < one.high < 1
