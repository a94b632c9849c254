"""Audits: estimates without the noise of continuations, and gradients held against a reference."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import Namespace
from transformers import Qwen3ForCausalLM

from asyppo.audit import audit_gradients, audit_values, gradients, values
from asyppo.audit.estimates import (
    States,
    accuracy_of,
    advantage_and_truth,
    by_fifth,
    by_fraction,
    by_token,
    dropped_by,
    intervals,
    of_all,
    rank_within_prompts,
    sigma_and_error,
    spearman,
)
from asyppo.audit.gradients import Gradients, cosines
from asyppo.audit.values import choose
from asyppo.cli.audit import arm_of, changes_of, find_checkpoint, nested
from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.models.policy import Policy
from asyppo.report.audits import gradient_tables, text_of, value_tables
from asyppo.run.durable import as_json
from asyppo.run.progress import ProgressDisplay

VOCABULARY, HORIZON = 5, 4
ROWS = [{"prompt": text} for text in ("a", "ba", "bb", "ab")]


def made_up(states: int, continuations: int, seed: int = 0) -> tuple[States, dict[str, np.ndarray]]:
    """States of which everything is known: V* differs by prompt and state, returns are 0 or 1, V̄ errs by σ."""
    generator = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(states // 8), 8)
    truth = np.clip(
        generator.uniform(0.2, 0.8, len(prompt) // 8)[prompt] + generator.uniform(-0.2, 0.2, len(prompt)), 0, 1
    )
    behind = np.clip(truth + generator.normal(0, 0.1, len(prompt)), 0, 1)
    sigma = generator.exponential(0.1, len(prompt))
    value = truth + 0.05 + sigma * generator.choice([-1, 1], len(prompt))

    def drawn(chance: np.ndarray) -> np.ndarray:
        return (generator.random((len(prompt), continuations)) < chance[:, None]).astype(float)

    length = generator.integers(1, 20, len(prompt))
    made = States(
        prompt=prompt,
        position=generator.integers(0, length),
        length=length,
        value=value,
        values=np.stack([value - sigma, value + sigma], axis=1),
        std=sigma,
        returns=drawn(truth),
        next_returns=drawn(behind),
        advantage=behind - truth + generator.normal(0, 0.1, len(prompt)),
        logprob=np.log(generator.uniform(0.1, 1, len(prompt))),
        advantage_keep=sigma > np.quantile(sigma, 0.2),
        entropy_keep=sigma < np.quantile(sigma, 0.8),
    )
    return made, {"truth": truth, "behind": behind}


def test_estimates_are_those_of_the_truth() -> None:
    """With 5 continuations a state, whose noise is larger than what is looked for, at 40,000 states."""
    states, known = made_up(40_000, 5)
    truth, advantage = known["truth"], known["behind"] - known["truth"]
    error = states.value - truth
    found = accuracy_of(states, states.value)
    assert found["bias"] == pytest.approx(error.mean(), abs=0.004)
    assert found["rmse"] ** 2 == pytest.approx((error**2).mean(), rel=0.04)
    assert found["explained"] == pytest.approx(1 - error.var() / truth.var(), abs=0.02)
    assert found["correlation"] == pytest.approx(np.corrcoef(states.value, truth)[0, 1], abs=0.01)
    # Without the correction the error would be more than twice that.
    assert ((states.value - states.truth) ** 2).mean() > 2 * (error**2).mean()

    def within(x: np.ndarray) -> float:
        return float((x.reshape(-1, 8).var(axis=1, ddof=1)).mean())

    assert found["explained_within_prompts"] == pytest.approx(1 - within(error) / within(truth), abs=0.05)
    marked = sigma_and_error(states)
    assert marked["corrected"] == pytest.approx(np.corrcoef(states.std.argsort().argsort(), error**2)[0, 1], abs=0.05)
    assert marked["rank"] < 0.5 < spearman(states.std, np.abs(error))
    true = advantage_and_truth(states)
    assert true["corrected"] == pytest.approx(np.corrcoef(states.advantage, advantage)[0, 1], abs=0.05)
    assert true["raw"] < 0.5 * true["corrected"]
    assert true["rms"] ** 2 == pytest.approx((advantage**2).mean(), rel=0.1)
    for keep in (states.advantage_keep, states.entropy_keep):
        dropped = dropped_by(states, keep)
        chance = np.exp(states.logprob)
        for name, amount in (
            ("squared_error", error**2),
            ("squared_advantage", advantage**2),
            ("squared_gradient", (advantage * (1 - chance)) ** 2),
        ):
            assert dropped[name] == pytest.approx(amount[~keep].sum() / amount.sum(), abs=0.06), name
        assert dropped["tokens"] == pytest.approx(0.2, abs=0.001)


def test_ranks_within_prompts_without_noise() -> None:
    """The correction for attenuation brings the rank correlation of 6 continuations near that of the truth."""
    states, known = made_up(4000, 6)
    value = known["truth"] + np.random.default_rng(1).normal(0, 0.05, len(states))
    found = rank_within_prompts(states, value)
    true = np.mean([spearman(v, t) for v, t in zip(value.reshape(-1, 8), known["truth"].reshape(-1, 8), strict=True)])
    assert found["rank"] < true - 0.2
    assert found["rank_corrected"] == pytest.approx(true, abs=0.08)


def test_intervals_are_over_prompts() -> None:
    """95 % of them hold the truth, or about so, where the states of a prompt err together."""
    generator, held = np.random.default_rng(0), 0
    for trial in range(60):
        states, known = made_up(160, 16, seed=trial)

        def bias(states: States) -> dict[str, float]:
            return {"bias": float((states.value - states.truth).mean())}

        states = replace(states, value=known["truth"] + 0.3 * generator.normal(size=20)[states.prompt])
        found = intervals(states, bias, resamples=100, seed=trial)["bias"]
        held += found["low"] <= 0 <= found["high"]
    assert 50 <= held <= 60


def test_bins() -> None:
    states = replace(made_up(8, 4)[0], position=np.array([0, 1, 2, 3, 4, 7, 8, 9]), length=np.full(8, 10))
    names, which = by_fraction(states)
    assert (names[0], names[4]) == ("0–20 %", "80–100 %")
    assert which.tolist() == [0, 0, 1, 1, 2, 3, 4, 4]
    names, which = by_token(states)
    assert names == ["1", "2", "3–4", "5–8", "9–16"]
    assert which.tolist() == [0, 1, 2, 2, 3, 3, 4, 4]
    names, which = by_fifth(np.array([0.0, 0, 0, 0, 0, 0, 1, 2]))
    assert (names, which.tolist()) == (["0–0", "1–1", "2–2"], [0] * 6 + [1, 2]) or len(names) == 2
    assert by_fifth(np.zeros(4))[1].tolist() == [0] * 4


def test_states_are_tokens_of_some_responses_of_each_prompt() -> None:
    lengths, groups = [5, 9, 5, 9, 1, 1], [0, 0, 0, 1, 1, 1]
    chosen = choose(lengths, groups, 8, seed=0)
    assert len({tuple(row) for row in chosen.tolist()}) == 8
    assert set(chosen[:, 0]) == {0, 3}
    assert all(0 <= t < lengths[b] for b, t in chosen)
    assert np.array_equal(chosen, choose(lengths, groups, 8, seed=0))
    assert len(choose(lengths, groups, 1000, seed=0)) == sum(lengths)
    counts = np.zeros(9)
    for seed in range(400):
        counts += np.bincount(choose([9, 9], [0, 1], 4, seed)[:, 1], minlength=9)
    assert counts.min() > 0.7 * counts.mean()


def score(ids: list[int]) -> float:
    """Something that depends on every token."""
    return sum((i + 1) * token for i, token in enumerate(ids)) % 7 / 7


@pytest.fixture
def make_trainer(
    tiny_trainer: Callable[..., Any], tiny_lm: Callable[..., Qwen3ForCausalLM], tiny_config: Callable[..., Any]
) -> Callable[..., Any]:
    """Make a trainer of a policy that knows five tokens."""

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [score(ids) for ids in completion_ids]

    def make(**fields: Any) -> Any:
        config = tiny_config(**({"max_completion_length": HORIZON, "prompts_per_step": 4} | fields))
        policy = Policy(tiny_lm(vocab_size=VOCABULARY), temperature=1.0)
        return tiny_trainer(config, reward, policy=policy, train_dataset=ROWS)

    return make


def test_an_audit_is_what_enumeration_says(make_trainer: Callable[..., Any], exact_value: Callable[..., float]) -> None:
    trainer = make_trainer(num_generations=8, generation_batch_size=2000)
    before = {name: p.clone() for name, p in trainer.critics.state_dict().items()}
    generator = torch.get_rng_state()
    found = audit_values(trainer, states=24, continuations=100, split="train", seed=3)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(p, before[name]) for name, p in trainer.critics.state_dict().items())
    states, batch = found.states, found.batch.sampled.batch
    exact, following = [], []
    for b, t in found.rows.tolist():
        prompt, length = (of[b] for of in batch.on_host)
        tokens = batch.tokens[b, : prompt + length].tolist()

        def value(written: int, prompt: int = prompt, tokens: list[int] = tokens) -> float:
            model = trainer.policy.model
            return exact_value(model, tokens[: prompt + written], HORIZON - written, lambda ids: score(ids[prompt:]))

        exact.append(value(t))
        following.append(score(tokens[prompt:]) if t + 1 == length else value(t + 1))
    for returns, true in ((states.returns, exact), (states.next_returns, following)):
        noise = np.sqrt(returns.var(axis=1, ddof=1) / 100)
        distance = (returns.mean(axis=1) - np.array(true)) / np.maximum(noise, 1e-6)
        assert np.abs(distance).max() < 4.5
        assert (distance**2).mean() < 2
    error = states.value - np.array(exact)
    results = found.results(resamples=50)
    numbers = {name: number["value"] for name, number in results["numbers"].items()}
    margin = 4 * numbers["truth/standard_error"] / math.sqrt(len(states))
    assert numbers["value/bias"] == pytest.approx(error.mean(), abs=margin)
    assert numbers["value/rmse"] == pytest.approx(math.sqrt((error**2).mean()), abs=margin)
    assert numbers["truth/std"] == pytest.approx(np.std(exact, ddof=1), abs=margin)
    assert numbers["value/correlation"] == pytest.approx(np.corrcoef(states.value, exact)[0, 1], abs=0.15)
    low_high = results["numbers"]["value/bias"]
    assert low_high["low"] < numbers["value/bias"] < low_high["high"]
    text = text_of(value_tables(as_json(results)))
    assert "V̄ " in text
    assert "critic 1" in text
    assert sum(row["states"] for row in results["tables"]["token"]) == len(states) == 24


def test_an_audit_ends_with_its_budget_or_a_signal(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is done is the beginning of the whole; samples have the truth where it is known."""
    trainer = make_trainer(generation_batch_size=16)
    whole = audit_values(trainer, states=24, continuations=4, split="train")
    part = audit_values(trainer, states=24, continuations=4, split="train", budget=1)
    assert (len(whole.states), len(part.states)) == (24, 16)
    assert np.array_equal(part.states.returns, whole.states.returns[:16])
    assert part.stopped_by is None
    advance = ProgressDisplay.advance

    def stopping(self: ProgressDisplay, note: str = "", *, count: int = 1) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        advance(self, note, count=count)

    monkeypatch.setattr(ProgressDisplay, "advance", stopping)
    stopped = audit_values(trainer, states=24, continuations=4, split="train")
    assert (len(stopped.states), stopped.stopped_by) == (16, signal.SIGINT)
    rows = whole.samples(trainer, 7)
    known = [(b, t) for b, row in enumerate(rows) for t, x in enumerate(row["truth"]) if x is not None]
    assert len(known) == len(whole.states)
    assert all((row["split"], row["step"]) == ("audit", 7) for row in rows)
    assert len({len(row["truth"]) == len(row["tokens"]) == len(row["truth_se"]) for row in rows}) == 1


def test_fitting_first_is_what_a_step_does(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(critic={"learning_rate": 0.1})
    plain = audit_values(trainer, states=8, continuations=4, split="train")
    fitted = audit_values(trainer, states=8, continuations=4, split="train", fit=True)
    assert np.array_equal(plain.states.returns, fitted.states.returns)
    assert not np.allclose(plain.states.value, fitted.states.value)


def test_an_audit_without_critics_is_of_the_baseline(make_trainer: Callable[..., Any]) -> None:
    found = audit_values(make_trainer(algorithm="grpo"), states=12, continuations=4, split="train").results(
        resamples=20
    )
    assert "critic_0/bias" not in found["numbers"]
    assert "sigma/rank" not in found["numbers"]
    assert len(value_tables(as_json(found))) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"states": 2}, "--states: got 2, needs at least 8"),
        ({"continuations": 3}, "--continuations: got 3, needs at least 4"),
        ({"prompts": 1}, "--prompts: got 1, needs at least 2"),
        ({"budget": 0}, "--budget: got 0, needs at least 1"),
        ({"split": "eval"}, "--split: got eval, but the run holds no prompts out; needs train"),
    ],
)
def test_audits_that_cannot_be(make_trainer: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        audit_values(make_trainer(), **arguments)


def gathered(count: int, expected: torch.Tensor, noise: float, seed: int, references: Any = None) -> Gradients:
    """The sums of ``count`` gradients."""
    generator, found = torch.Generator().manual_seed(seed), Gradients()
    for _ in range(count):
        found.add(expected + noise * torch.randn(expected.shape, generator=generator), references)
    return found


def test_sums_are_those_of_all_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    all_of_them = torch.randn(7, 50, generator=generator)
    found = Gradients()
    for gradient in all_of_them:
        found.add(gradient, {"r": all_of_them[0]})
    products = all_of_them.double() @ all_of_them.double().T
    pairs = products[~torch.eye(7, dtype=torch.bool)]
    assert found.square == pytest.approx(float(pairs.mean()), rel=1e-5)
    assert found.along["r"] == pytest.approx(products[0].tolist(), rel=1e-5)
    torch.testing.assert_close(found.mean, all_of_them.mean(dim=0))


def test_cosines_are_those_of_expectations() -> None:
    """With noise ten times the signal: itself 1, an orthogonal one 0, another 0.6, and intervals that hold them."""
    e, f = torch.zeros(2, 400)
    e[0], f[1] = 1, 1
    reference = gathered(400, e, 0.5, 1)
    assert reference.square == pytest.approx(1, abs=0.1)
    held = {0: 0, 1: 0}
    for trial in range(40):
        for which, (expected, cosine) in enumerate(((e, 1.0), (0.6 * e + 0.8 * f, 0.6))):
            found = gathered(24, expected, 0.5, 100 + trial, {"r": reference.mean})
            numbers = cosines(found, "r", reference)
            held[which] += numbers["cosine_of_expectation"]["low"] <= cosine <= numbers["cosine_of_expectation"]["high"]
            assert numbers["cosine"]["value"] == pytest.approx(cosine / math.sqrt(1 + 400 * 0.25), abs=0.04)
    assert all(35 <= count <= 40 for count in held.values()), held
    apart = cosines(gathered(60, f, 0.5, 9, {"r": reference.mean}), "r", reference)
    assert apart["cosine_of_expectation"]["value"] == pytest.approx(0, abs=0.15)
    many = cosines(gathered(300, e, 0.5, 5, {"r": reference.mean}), "r", reference)
    assert many["noise"]["value"] == pytest.approx(100, rel=0.2)
    assert many["noise"]["low"] < 100 < many["noise"]["high"]


def no_build(config: AsyPPOConfig) -> Any:
    raise AssertionError("the run's critics will do")


@pytest.mark.slow
def test_gradients_of_arms(make_trainer: Callable[..., Any]) -> None:
    """The reference's own estimator points where it does; equal arms are equal; nothing learns, or is drawn twice."""
    trainer = make_trainer(num_generations=8, whiten="none")
    config = trainer.config
    arms = {
        "rloo": replace(config, algorithm="rloo"),
        "again": replace(config, algorithm="rloo"),
        "lam": replace(config, lam=0.5),
    }
    weights = {name: p.clone() for part in (trainer.policy, trainer.critics) for name, p in part.state_dict().items()}
    found = audit_gradients(trainer, arms, no_build, batches=8, reference_batches=16, seed=1)
    after = {name: p for part in (trainer.policy, trainer.critics) for name, p in part.state_dict().items()}
    assert all(torch.equal(after[name], p) for name, p in weights.items())
    assert all(p.grad is None for p in trainer.policy.parameters())
    results = found.results()
    rloo, again = (results["arms"][name] for name in ("rloo", "again"))
    assert rloo["loss"]["cosine_of_expectation"]["value"] == pytest.approx(1, abs=0.25)
    assert rloo["loss"]["cosine"]["value"] > 0.3
    assert again["loss"]["cosine"] == rloo["loss"]["cosine"]
    assert again["loss"]["minus_first"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert results["arms"]["lam"]["loss"]["minus_first"]["value"] != 0
    same = audit_gradients(trainer, {"run": config}, no_build, batches=4, reference_batches=4, seed=1)
    assert same.references["loss"].squares == found.references["loss"].squares[:4]
    text = text_of(gradient_tables(as_json(results)))
    assert [line.split()[0] for line in text.splitlines()[2:]] == list(arms)


def test_critics_of_an_arm_learn_first(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the run's policy, from batches of their own; arms with equal ones share them."""
    trainer = make_trainer(algorithm="grpo")
    with torch.no_grad():
        trainer.policy.model.lm_head.weight.mul_(1.5)
    built, learned = [], []

    def build(config: AsyPPOConfig) -> Any:
        made = make_trainer(algorithm=config.algorithm, lam=config.lam)
        built.append(made)
        return made

    real = gradients.values_of
    monkeypatch.setattr(
        gradients,
        "values_of",
        lambda judge, *a, **k: learned.append((id(judge.critics), k["fit"])) or real(judge, *a, **k),
    )
    changed = {
        "a": replace(trainer.config, algorithm="asyppo"),
        "b": replace(trainer.config, algorithm="asyppo", lam=0.5),
    }
    arms = {"run": trainer.config} | changed
    audit_gradients(trainer, arms, build, batches=4, reference_batches=4, critic_steps=3)
    assert torch.equal(built[0].policy.model.lm_head.weight, trainer.policy.model.lm_head.weight)
    own = [of for of in learned if of[0] == id(built[0].critics)]
    assert own == [(id(built[0].critics), True)] * (3 + 4)
    assert not any(of[0] == id(built[1].critics) for of in learned)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 3}, "--batches: got 3, needs at least 4"),
        ({"reference_batches": 0}, "--reference_batches: got 0, needs at least 4"),
        ({"critic_steps": -1}, "--critic_steps: got -1, needs at least 0"),
    ],
)
def test_gradient_audits_that_cannot_be(
    make_trainer: Callable[..., Any], arguments: dict[str, Any], message: str
) -> None:
    trainer = make_trainer()
    with pytest.raises(ConfigError, match=re.escape(message)):
        audit_gradients(trainer, {"run": trainer.config}, no_build, **arguments)


def test_arms_of_the_command_line(tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    config = tiny_config(advantage_mask_skip=2)
    assert nested("lam=0.5 critic.num_critics=4 critic.share=all 'data.prompt_suffix=a b'", "--arm") == {
        "lam": 0.5,
        "critic": {"num_critics": 4, "share": "all"},
        "data": {"prompt_suffix": "a b"},
    }
    file = tmp_path / "arms.yaml"
    file.write_text(
        "seeds: [1]\narms: {one: {critic.num_critics: 1}, two: {critic: {share: all}, whiten: none}, three: null}"
    )
    arms = changes_of(config, Namespace(arms=str(file), arm=["low: lam=0.5", "algorithm=grpo"]))
    assert arms == {
        "one": {"critic": {"num_critics": 1}},
        "two": {"critic": {"share": "all"}, "whiten": "none"},
        "three": {},
        "low": {"lam": 0.5},
        "algorithm=grpo": {"algorithm": "grpo"},
    }
    made = {name: arm_of(config, name, change) for name, change in arms.items()}
    assert made["one"].critic == replace(config.critic, num_critics=1)
    assert made["three"] == config
    assert (made["algorithm=grpo"].algorithm, made["algorithm=grpo"].advantage_mask_skip) == ("grpo", 0)
    usual = changes_of(config, Namespace(arms=None, arm=[]))
    assert next(iter(usual)) == "the run's"
    assert arm_of(config, "grpo", usual["grpo"]).num_critics == 0
    without = changes_of(tiny_config(algorithm="grpo"), Namespace(arms=None, arm=[]))
    assert list(without) == ["grpo", "rloo"]
    for text, message in (("lam", "--arm: got 'lam', needs settings as key=value"),):
        with pytest.raises(ConfigError, match=re.escape(message)):
            nested(text, "--arm")
    with pytest.raises(ConfigError, match=r"--arm x: .*lamm"):
        arm_of(config, "x", {"lamm": 1})
    file.write_text("seeds: [1]")
    with pytest.raises(ConfigError, match="--arms: got None under arms, needs a mapping"):
        changes_of(config, Namespace(arms=str(file), arm=[]))
    with pytest.raises(ConfigError, match="needs the directory of a run that has a checkpoint, or a checkpoint"):
        find_checkpoint(str(tmp_path))
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"step": step}))
    assert find_checkpoint(str(tmp_path)).name == "checkpoint-10"
    assert find_checkpoint(str(tmp_path / "checkpoint-9")).name == "checkpoint-9"


def test_all_numbers_have_names_of_their_own() -> None:
    assert values.LEAST == 8
    found = of_all(made_up(64, 6)[0])
    assert {
        "truth/mean",
        "value/rmse",
        "critic_1/explained",
        "sigma/corrected",
        "advantage_mask/squared_gradient",
    } <= set(found)
    assert all(isinstance(number, float) for number in found.values())
