"""Values from continuations, against all that can be written (five tokens, four of them at most)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from asyppo.algorithm.advantage import critics_advantage, monte_carlo_advantage, whiten
from asyppo.algorithm.options import AdvantageOptions
from asyppo.algorithm.signal import Outcome, StateValues
from asyppo.config import ConfigError, MonteCarloConfig
from asyppo.models.policy import Policy
from asyppo.rollout.continuations import State, after_boundaries, monte_carlo_states, monte_carlo_values, state_at
from asyppo.run.progress import Timer

VOCABULARY, HORIZON = 5, 4


def score(ids: list[int]) -> float:
    """Something that depends on every token."""
    return sum((i + 1) * token for i, token in enumerate(ids)) % 7 / 7


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """As a reward function."""
    return [score(ids) for ids in completion_ids]


@pytest.fixture
def make_trainer(
    tiny_trainer: Callable[..., Any], tiny_lm: Callable[..., Qwen3ForCausalLM], tiny_config: Callable[..., Any]
) -> Callable[..., Any]:
    """Make a trainer of a policy that knows five tokens."""

    def make(**fields: Any) -> Any:
        config = tiny_config(**({"algorithm": "vineppo", "max_completion_length": HORIZON} | fields))
        return tiny_trainer(config, reward, policy=Policy(tiny_lm(vocab_size=VOCABULARY), temperature=1.0), **DATA)

    return make


DATA: dict[str, Any] = {"train_dataset": [{"prompt": "a"}, {"prompt": "ba"}, {"prompt": "bb"}]}


def test_continuations_estimate_the_value(make_trainer: Callable[..., Any], exact_value: Callable[..., float]) -> None:
    """From states of all lengths, in batches of several limits: within 4 standard errors each, 2 in the mean square."""
    trainer = make_trainer(generation_batch_size=2400)
    prompt = torch.tensor([4, 3])
    states = [State({"prompt": "ba"}, prompt, torch.tensor(w, dtype=torch.int64)) for w in ([], [2], [3, 4], [4, 0, 2])]
    torch.manual_seed(3)
    continued = trainer.continuations()(states, 1200)
    model = trainer.policy.model
    exact = [
        exact_value(model, [4, 3, *s.written.tolist()], HORIZON - len(s.written), lambda ids: score(ids[2:]))
        for s in states
    ]
    distance = (continued.mean - torch.tensor(exact)) / continued.noise.sqrt()
    assert distance.abs().max() < 4
    assert distance.square().mean() < 4
    assert continued.tokens >= 1200 * 4


def test_the_sampler_is_asked_for_no_more_than_it_can(
    make_trainer: Callable[..., Any], scripted_sampler: Callable[..., Any]
) -> None:
    """States of other lengths go together where there is room behind them."""
    trainer = make_trainer()
    states = [State({"prompt": "a"}, torch.tensor([3]), torch.full((n,), 3)) for n in (3, 0, 1, 1, 3)]
    for longest, calls in ((100, [4]), (5, [4, 3, 1]), (6, [4, 1])):
        sampler = trainer.rollout.sampler = scripted_sampler([[1]])
        limits: list[int] = []
        sample = sampler.sample
        sampler.sample = lambda prompts, max_completion_length, temperature, sample=sample, limits=limits: (
            limits.append(max_completion_length) or sample(prompts, max_completion_length=1, temperature=temperature)
        )
        continuations = trainer.continuations()
        continuations.longest = longest
        continuations(states, 1)
        assert limits == calls
        for limit, prompts in zip(limits, sampler.calls, strict=True):
            assert max(map(len, prompts)) + limit <= longest


def test_rewards_from_the_state_on_are_discounted_to_it(
    make_trainer: Callable[..., Any], scripted_sampler: Callable[..., Any]
) -> None:
    """What was written before is not paid again, penalties on length are, and what is past a state's limit is cut."""
    trainer = make_trainer(gamma=0.5, overlong_buffer_len=1, monte_carlo=MonteCarloConfig(every=1))
    trainer.rollout.sampler = scripted_sampler([[3, 1], [3, 3, 3, 3]])

    def by_token(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
        return [[float(10**i) for i in range(len(ids))] for ids in completion_ids]

    trainer.rollout.reward_funcs = [by_token]
    written = torch.tensor([2, 2])
    states = [State({"prompt": "a"}, torch.tensor([3]), written[:n]) for n in (0, 2)]
    continued = trainer.continuations()(states, 2)
    # Nothing, then 4 tokens with the penalty of 1 at the last; two tokens, with it, however many were drawn.
    assert continued.returns.tolist() == [[1 + 5, 1 + 5 + 25 + 124.875], [100 + 499.5, 100 + 499.5]]


def test_values_of_a_step(make_trainer: Callable[..., Any], exact_value: Callable[..., float]) -> None:
    """The first states of a prompt's responses are one, and all converge to what they are."""
    trainer = make_trainer(monte_carlo=MonteCarloConfig(num_continuations=400, every=2), generation_batch_size=1000)
    torch.manual_seed(1)
    sampled = trainer.rollout(1, Timer(trainer.device))
    found, metrics = monte_carlo_values(sampled, trainer.continuations(), 1)
    assert found.states.tolist() == [[t < n and t % 2 == 0 for t in range(HORIZON)] for n in sampled.batch.on_host[1]]
    errors = []
    for b, t in found.states.nonzero().tolist():
        state = state_at(sampled, b, t)
        tokens, prompt = [*state.prompt.tolist(), *state.written.tolist()], len(state.prompt)
        exact = exact_value(trainer.policy.model, tokens, HORIZON - t, lambda ids, prompt=prompt: score(ids[prompt:]))
        errors.append(float(found.value[b, t]) - exact)
    for group in range(3):
        own = sampled.batch.group == group
        assert len(found.value[own, 0].unique()) == 1
    squared = torch.tensor(errors).square().mean()
    assert float(squared) ** 0.5 < 2 * metrics["monte_carlo/value_se"] < 0.05
    assert metrics["monte_carlo/states"] == len(errors)
    assert metrics["monte_carlo/continuations"] < 400 * len(errors)
    assert metrics["monte_carlo/tokens_per_response_token"] == metrics["monte_carlo/tokens"] / sum(
        sampled.batch.on_host[1]
    )


def test_states_after_boundaries(
    make_trainer: Callable[..., Any], scripted_sampler: Callable[..., Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    assert after_boundaries(["1+", "1=2", ",", " 2", "+1", ", ", "x,"], [",", "=2, 2"]) == [3, 4, 6]
    assert after_boundaries(["a", "\n", "\n", "b", "\n\n"], ["\n\n"]) == [3]
    trainer = make_trainer(monte_carlo=MonteCarloConfig(boundaries=["ab"]))
    trainer.rollout.sampler = scripted_sampler([[3, 4, 3, 4], [4, 3, 4, 1], [3, 1]])
    sampled = trainer.rollout(1, Timer(trainer.device))
    states = monte_carlo_states(sampled, trainer.rollout)
    assert [row.nonzero()[:, 0].tolist() for row in states[:3]] == [[0, 2], [0, 3], [0]]


def outcome_of(seed: int = 0, critics: int = 0) -> Outcome:
    """Three responses of 5, 3 and 1 tokens, states anywhere, NaN where nothing is to be read."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    states = torch.tensor([[1, 0, 1, 1, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    reward = torch.randn(3, 5, generator=generator).where(mask, torch.nan)
    value = torch.randn(3, 5, generator=generator).where(states, torch.nan)
    values = torch.randn(critics, 3, 5, generator=generator) if critics else None
    return Outcome(reward, mask, mask, torch.zeros(3).long(), values, monte_carlo=StateValues(value, states))


def test_an_action_is_what_is_written_between_states() -> None:
    outcome = outcome_of()
    assert outcome.monte_carlo is not None
    r, v = outcome.reward[0], outcome.monte_carlo.value[0]
    signal = monte_carlo_advantage(outcome, AdvantageOptions(lam=0.5, whiten="none"))
    deltas = [r[0] + r[1] + v[2] - v[0], r[2] + v[3] - v[2], r[3] + r[4] - v[3]]
    last = deltas[2]
    middle = deltas[1] + 0.5 * last
    first = deltas[0] + 0.5 * middle
    torch.testing.assert_close(signal.advantage[0], torch.stack([first, first, middle, last, last]))
    torch.testing.assert_close(
        signal.advantage[1],
        torch.tensor([1.0, 1, 1, 0, 0]) * (outcome.reward[1, :3].sum() - outcome.monte_carlo.value[1, 0]),
    )
    assert signal.value[0].tolist() == v[[0, 0, 2, 3, 3]].tolist()
    assert signal.value[1].tolist() == [*[float(outcome.monte_carlo.value[1, 0])] * 3, 0, 0]
    torch.testing.assert_close(signal.returns[0, 2:], torch.stack([r[2:].sum(), r[3:].sum(), r[3:].sum()]))
    assert torch.equal(signal.advantage_keep, outcome.mask)
    assert len(signal.values) == 0
    whitened = monte_carlo_advantage(outcome, AdvantageOptions(lam=0.5)).advantage
    torch.testing.assert_close(whitened, whiten(signal.advantage, outcome.mask, outcome.group, "batch"))


def test_critics_beside_them_still_mask() -> None:
    outcome, options = (
        outcome_of(critics=2),
        AdvantageOptions(advantage_values="monte_carlo", advantage_mask_fraction=0.3),
    )
    signal, of_critics = (
        critics_advantage(outcome, options),
        critics_advantage(
            replace(outcome, reward=outcome.reward.nan_to_num(0)), replace(options, advantage_values="after")
        ),
    )
    assert torch.equal(signal.advantage, monte_carlo_advantage(replace(outcome, values=None), options).advantage)
    assert torch.equal(signal.advantage_keep, of_critics.advantage_keep)
    assert not signal.advantage_keep.equal(outcome.mask)
    assert torch.equal(signal.std, of_critics.std)
    with pytest.raises(ValueError, match="monte_carlo: got None, needs values from continuations"):
        critics_advantage(replace(outcome, monte_carlo=None), options)


def test_sampling_is_what_it_is_without_them(make_trainer: Callable[..., Any]) -> None:
    """Critics may learn beside them, from the same responses."""
    results = [
        make_trainer(algorithm="asyppo", advantage_values=way, monte_carlo=MonteCarloConfig(2, 1)).step(1)
        for way in ("before", "monte_carlo")
    ]
    before, continued = (result.samples for result in results)
    assert [s["completion"] for s in before] == [s["completion"] for s in continued]
    assert results[1].metrics["monte_carlo/tokens"] > 0
    assert results[1].metrics["timing_s/continuations"] > 0
    assert results[0].metrics["critic/0/vf_loss"] == results[1].metrics["critic/0/vf_loss"]
    assert [s["value"] for s in before] != [s["value"] for s in continued]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"algorithm": "grpo", "advantage_values": "monte_carlo"},
            "advantage_values: got 'monte_carlo', needs a critic, algorithm grpo has 0 here; vineppo takes values from "
            "continuations without any",
        ),
        ({"gamma": 0.9}, "gamma: got 0.9, needs 1 for values from continuations, or monte_carlo.every 1"),
        (
            {"gamma": 0.9, "monte_carlo": MonteCarloConfig(every=1, boundaries=["."])},
            "gamma: got 0.9, needs 1 for values from continuations",
        ),
        (
            {"monte_carlo": MonteCarloConfig(boundaries=[""])},
            "monte_carlo.boundaries: got [''], needs texts that are not",
        ),
        ({"monte_carlo": MonteCarloConfig(every=0)}, "monte_carlo.every: got 0, needs an integer of at least 1"),
    ],
)
def test_settings_that_cannot_work(tiny_config: Callable[..., Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        tiny_config(**({"algorithm": "vineppo"} | fields)).validate()


def test_settings_that_work(tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    tiny_config(algorithm="vineppo").validate()
    tiny_config(algorithm="vineppo", advantage_values="monte_carlo").validate()
    tiny_config(advantage_values="monte_carlo").validate()
    tiny_config(algorithm="vineppo", gamma=0.9, monte_carlo=MonteCarloConfig(every=1)).validate()
