"""The loop: exact accumulation, the first ratio, warm-up, seeds, precision, steps that are not finite."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import asyppo.algorithm.advantage
import asyppo.trainer
from asyppo.algorithm.advantage import critics_advantage, group_advantage
from asyppo.algorithm.ops import FUSED
from asyppo.algorithm.options import AdvantageOptions
from asyppo.algorithm.signal import LearningSignal, Outcome
from asyppo.config import AsyPPOConfig, ConfigError, DataConfig
from asyppo.data.batch import Batch
from asyppo.models.critics import CriticOptimizer, Critics, StackedCritics
from asyppo.models.policy import Policy
from asyppo.run.directory import read_jsonl
from asyppo.trainer import AsyPPOTrainer, TrainingError

Make = Callable[..., Any]


def likes_a(completions: list[str], **_: Any) -> list[float]:
    """Share of a's."""
    return [c.count("a") / max(len(c), 1) for c in completions]


def weights(model: torch.nn.Module) -> list[Tensor]:
    """Copies of all weights."""
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Equal, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """Gradients at each optimizer step, none of which is taken."""
    seen: list[list[Tensor]] = []

    def capture(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *_: Any) -> float:
        seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.zero_grad()
        return 1.0

    def capture_critics(self: CriticOptimizer, losses: Tensor, *_: Any, **__: Any) -> list[float]:
        self.critics.collect_gradients()
        seen.extend([p.grad.clone() for p in model.parameters()] for model in self.critics.models)
        self.critics.release_gradients()
        return [1.0] * len(losses)

    monkeypatch.setattr(asyppo.trainer, "_clip_and_step", capture)
    monkeypatch.setattr(CriticOptimizer, "step", capture_critics)
    return seen


CUTS = [(10_000, 1), (10_000, 3), (30, 1), (17, 4), (1, 1), (1, 99)]


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean"])
def test_policy_gradient_does_not_depend_on_micro_batches_or_packing(
    tiny_config: Make, tiny_trainer: Make, ragged_batch: Make, gradients: list, aggregation: Any
) -> None:
    batch: Batch = ragged_batch()
    random = torch.rand_like(batch.reward)
    signal = replace(
        group_advantage(Outcome(batch.reward, batch.mask, batch.mask, batch.group), AdvantageOptions()),
        advantage=torch.randn_like(batch.reward),
        advantage_keep=batch.mask & (random > 0.2),
        entropy_keep=batch.mask & (random < 0.8),
    )
    old = torch.where(batch.mask, -3 + 0.3 * torch.randn_like(batch.reward), 0.0)
    for i, (budget, steps) in enumerate(CUTS):
        config = tiny_config(
            max_tokens_per_micro_batch=budget,
            gradient_accumulation_steps=steps,
            loss_aggregation=aggregation,
            num_mini_batches=2,
            entropy_coef=0.1,
            beta=0.1,
        )
        config.policy.packing = (False, True, "auto")[i % 3]
        trainer = tiny_trainer(config, likes_a)
        trainer.update_policy(batch, signal, old, old + 0.1, torch.Generator().manual_seed(0))
    assert len(gradients) == 2 * len(CUTS)
    for i in range(2, len(gradients)):
        for one, other in zip(gradients[i % 2], gradients[i], strict=True):
            torch.testing.assert_close(other, one, atol=1e-5 * float(one.abs().max()), rtol=1e-5)


def test_critic_gradients_do_not_depend_on_micro_batches(
    tiny_config: Make, tiny_trainer: Make, ragged_batch: Make, gradients: list
) -> None:
    batch: Batch = ragged_batch()
    share = torch.arange(len(batch)) % 2
    losses = []
    for budget, _ in CUTS:
        config = tiny_config(max_tokens_per_micro_batch=budget, critic={"num_mini_batches": 2, "value_lambda": 0.9})
        trainer = tiny_trainer(config, likes_a)
        row = trainer.update_critics(batch, share, torch.Generator().manual_seed(0))
        losses.append((row["critic/0/vf_loss"], row["critic/1/vf_loss"], row["critic/vf_loss"]))
    assert len(gradients) == 4 * len(CUTS)
    for i in range(4, len(gradients)):
        for one, other in zip(gradients[i % 4], gradients[i], strict=True):
            torch.testing.assert_close(other, one, atol=1e-5 * float(one.abs().max()), rtol=1e-5)
    torch.testing.assert_close(losses, [losses[0]] * len(losses))
    assert losses[0][2] == pytest.approx((losses[0][0] + losses[0][1]) / 2)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("algorithm", ["asyppo", "ppo", "grpo"])
def test_ratio_is_one_at_the_first_update(
    tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch, algorithm: Any, temperature: float
) -> None:
    results = []
    op = FUSED.linear_ppo_loss

    def spy(*arguments: Any, **options: Any) -> Any:
        results.append(op(*arguments, **options))
        return results[-1]

    monkeypatch.setattr(Policy, "ops", replace(FUSED, linear_ppo_loss=spy))
    config = tiny_config(
        algorithm=algorithm, temperature=temperature, max_tokens_per_micro_batch=30, generation_batch_size=5
    )
    trainer = tiny_trainer(config, likes_a)
    row = trainer.step(1).metrics
    assert len(results) > 1
    for result in results:
        torch.testing.assert_close(result.ratio, torch.ones_like(result.ratio), atol=1e-4, rtol=0)
    assert row["actor/ppo_kl"] == pytest.approx(0, abs=1e-5)
    assert row["actor/pg_clipfrac"] == 0
    assert 0 <= row["sampling/sampling_logp_difference/mean"] <= row["sampling/sampling_logp_difference/max"] < 1e-4


def test_the_gap_to_the_sampler_is_seen(tiny_config: Make, tiny_trainer: Make, scripted_sampler: Make) -> None:
    """The scripted sampler claims a log-prob of -1 for each token."""
    config = tiny_config()
    trainer = tiny_trainer(config, likes_a, sampler=scripted_sampler([[3, 4, 1]]))
    row = trainer.step(1).metrics
    assert row["sampling/sampling_logp_difference/mean"] > 0.1


def test_warm_up_trains_the_critics_only(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config(critic={"warmup_steps": 1}, warmup_steps=2)
    trainer = tiny_trainer(config, likes_a)
    policy, critics = weights(trainer.policy), weights(trainer.critics)
    row = trainer.step(1).metrics
    assert same(weights(trainer.policy), policy)
    assert not same(weights(trainer.critics), critics)
    assert "actor/pg_loss" not in row
    assert "critic/vf_loss" in row
    rates = [trainer.step(step).metrics["actor/lr"] for step in (2, 3, 4)]
    assert rates == [0.5e-2, 1e-2, 1e-2]  # the rise is counted from the policy's first step
    assert not same(weights(trainer.policy), policy)


def test_grpo_has_no_warm_up(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config(algorithm="grpo", critic={"warmup_steps": 5})
    row = tiny_trainer(config, likes_a).step(1).metrics
    assert "actor/pg_loss" in row
    assert "critic/vf_loss" not in row


def test_the_reference_stays_where_it_is(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config(beta=0.1)
    trainer = tiny_trainer(config, likes_a)
    before = weights(trainer.reference)
    first, second = (trainer.step(step).metrics for step in (1, 2))
    assert same(weights(trainer.reference), before)
    assert first["actor/kl_loss"] == pytest.approx(0, abs=1e-6)
    assert second["actor/kl_loss"] > 1e-5


def test_each_critic_learns_from_its_share_only(
    tiny_config: Make, tiny_trainer: Make, ragged_batch: Make, gradients: list
) -> None:
    """What happens in the other share changes nothing."""
    batch: Batch = ragged_batch()
    share = torch.arange(len(batch)) % 2
    other = replace(batch, reward=torch.where((share == 1)[:, None], 5 * batch.reward, batch.reward))
    trainer = tiny_trainer(tiny_config(), likes_a)
    for one in (batch, other):
        trainer.update_critics(one, share, torch.Generator().manual_seed(0))
    assert same(gradients[0], gradients[2])
    assert not same(gradients[1], gradients[3])


def test_the_same_seed_gives_the_same_run(tiny_config: Make, tiny_trainer: Make) -> None:
    def rows(name: str, seed: int = 0, **changes: Any) -> list[dict[str, Any]]:
        config = tiny_config(run_name=name, max_steps=3, seed=seed, logging_samples=2, **changes)
        result = tiny_trainer(config, likes_a, eval_dataset=[{"prompt": "ab"}]).train()
        return [
            {key: value for key, value in row.items() if not key.startswith(("timing_s/", "perf/"))}
            for row in read_jsonl(result.run.metrics)
        ]

    first = rows("first")
    assert first == rows("second")
    assert first != rows("third", seed=1)
    # Neither evaluation nor checkpoints change the training.
    evaluated = rows("fourth", evaluation={"every": 1}, save_steps=1)
    assert [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in first] == [
        {k: v for k, v in row.items() if not k.startswith("eval/")} for row in evaluated
    ]


def test_checkpoints_during_the_warm_up_change_nothing(tiny_config: Make, tiny_trainer: Make) -> None:
    after = []
    for save_steps in (0, 1):
        config = tiny_config(
            run_name=f"run-{save_steps}", max_steps=3, save_steps=save_steps, critic={"warmup_steps": 1}
        )
        trainer = tiny_trainer(config, likes_a)
        trainer.train()
        after.append(weights(trainer.policy))
    assert same(*after)


def test_masters_are_float32_so_that_small_updates_count(tiny_config: Make, tiny_trainer: Make, tiny_lm: Make) -> None:
    config = tiny_config(learning_rate=1e-6, critic={"learning_rate": 1e-6})
    trainer = tiny_trainer(config, likes_a, dtype=torch.bfloat16)
    models = (trainer.policy, *trainer.critics.models)
    before = [weights(model) for model in models]
    trainer.step(1)
    for old, new in zip(before, map(weights, models), strict=True):
        large = [(a, b) for a, b in zip(old, new, strict=True) if a.dim() == 2]
        moved = sum(int((a != b).sum()) for a, b in large) / sum(a.numel() for a, _ in large)
        assert moved > 0.5
        change = torch.cat([(b - a).flatten() for a, b in large]).abs()
        assert change.max() < 3e-6
        # The same updates of bfloat16 weights of this size would round away.
        kept = sum(int(((a.bfloat16() + (b - a).bfloat16()) != a.bfloat16()).sum()) for a, b in large)
        assert kept < 0.01 * sum(a.numel() for a, _ in large)


# --- steps that are not finite ---


def poison_gradient(model: torch.nn.Module, when: Callable[[], bool], critic: int | None = None) -> None:
    """Put a NaN into one gradient of ``model`` when asked to; of stacked critics into that of one."""
    parameter = next(p for p in model.parameters() if p.dim() == (2 if critic is None else 3))

    def hook(gradient: Tensor) -> Tensor:
        if when():
            gradient = gradient.clone()
            gradient[() if critic is None else critic].view(-1)[0] = math.nan
        return gradient

    parameter.register_hook(hook)


@pytest.mark.parametrize(("victim", "stacked"), [("policy", True), ("critic", True), ("critic", False)])
def test_a_gradient_that_is_not_finite_skips_that_update(
    tiny_config: Make, tiny_trainer: Make, victim: str, stacked: bool, capsys: pytest.CaptureFixture
) -> None:
    config = tiny_config(max_steps=3, critic={"stacked": stacked})
    trainer = tiny_trainer(config, likes_a)
    now = {"step": 0}
    original = trainer.step

    def step(number: int) -> Any:
        now["step"] = number
        before.append([weights(m) for m in models])
        result = original(number)
        after.append([weights(m) for m in models])
        return result

    models = [trainer.policy.model, *trainer.critics.models]
    before: list[Any] = []
    after: list[Any] = []
    trainer.step = step
    hit = 0 if victim == "policy" else 2
    stack = (trainer.critics, 1) if victim == "critic" and stacked else (models[hit], None)
    poison_gradient(stack[0], lambda: now["step"] == 2, stack[1])
    rows = read_jsonl(trainer.train().run.metrics)
    key, other = f"{'actor' if victim == 'policy' else 'critic'}/skipped_updates", "skipped_updates"
    assert [row[key] for row in rows] == [0, 1, 0]
    skips = {k: row[k] for row in rows[1:2] for k in row if k.endswith(other) and row[k]}
    assert skips == ({key: 1} if victim == "policy" else {key: 1, "critic/1/skipped_updates": 1})
    for number in range(3):
        for m in range(3):
            assert same(before[number][m], after[number][m]) == (number == 1 and m == hit), (number, m)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert ["SKIPPED 1 update" in line for line in lines] == [False, True, False]
    assert all(p.isfinite().all() for model in models for p in model.parameters())


def test_a_loss_that_is_not_finite_skips_the_update(
    tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(outcome: Outcome, options: AdvantageOptions) -> LearningSignal:
        signal = critics_advantage(outcome, options)
        return replace(signal, advantage=signal.advantage * math.inf)

    monkeypatch.setattr(asyppo.algorithm.advantage, "critics_advantage", poisoned)
    config = tiny_config()
    trainer = tiny_trainer(config, likes_a)
    before = weights(trainer.policy)
    result = trainer.step(1)
    assert same(before, weights(trainer.policy))
    assert result.metrics["actor/skipped_updates"] == 1
    assert result.skipped


def test_many_such_steps_stop_the_run_with_a_usable_checkpoint(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config(max_steps=9, max_skipped_steps=2)
    trainer = tiny_trainer(config, likes_a)
    poison_gradient(trainer.policy, lambda: True)
    before = weights(trainer.policy)
    with pytest.raises(TrainingError, match=r"2 steps in a row .* step 2; .*checkpoint-2") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    run = Path(config.output_dir) / "run"
    loaded = AutoModelForCausalLM.from_pretrained(run / "checkpoint-2" / "policy")
    assert same(weights(loaded), before)
    critic = AutoModelForTokenClassification.from_pretrained(run / "checkpoint-2" / "critic_1")
    assert all(p.isfinite().all() for p in critic.parameters())
    assert (run / "report.html").stat().st_size > 0
    text = (run / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    rows = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [row["actor/grad_norm"] for row in rows] == [None, None]


def test_skipped_steps_must_be_in_a_row(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config(max_steps=5, max_skipped_steps=2)
    trainer = tiny_trainer(config, likes_a)
    calls = {"n": 0}

    def every_other() -> bool:
        calls["n"] += 1
        return calls["n"] % 2 == 1

    poison_gradient(trainer.policy, every_other)
    rows = read_jsonl(trainer.train().run.metrics)
    assert [row["actor/skipped_updates"] for row in rows] == [1, 0, 1, 0, 1]


# --- what the trainer refuses ---


def test_critics_that_do_not_fit_the_algorithm(
    tiny_config: Make, tiny_lm: Make, tiny_critic: Make, tokenizer: Any
) -> None:
    def build(config: AsyPPOConfig, critics: Critics | None) -> None:
        AsyPPOTrainer(
            policy=Policy(tiny_lm()),
            critics=critics,
            tokenizer=tokenizer,
            reward_funcs=[likes_a],
            train_dataset=[{"prompt": "a"}],
            config=config,
        )

    for config, count in ((tiny_config(), 0), (tiny_config(), 3), (tiny_config(algorithm="grpo"), 2)):
        critics = StackedCritics([tiny_critic() for _ in range(count)]) if count else None
        with pytest.raises(ConfigError, match=f"critics: got {count}, needs {config.num_critics}"):
            build(config, critics)


def test_a_temperature_that_is_not_the_policys(tiny_config: Make, tiny_trainer: Make, tiny_lm: Make) -> None:
    with pytest.raises(ConfigError, match=r"temperature: got 0\.7, needs the policy's 1\.0"):
        tiny_trainer(tiny_config(temperature=0.7), likes_a, policy=Policy(tiny_lm()))


def test_rows_that_cannot_be_used(tiny_config: Make, tiny_trainer: Make) -> None:
    for config, prompt, named in (
        (tiny_config(), "", r"bad_rows: train_dataset has 1 bad row: row 2: prompt: got '', needs text"),
        (tiny_config(), "a" * 60, r"row 2: 60 tokens, needs at most 59, the models' positions less max_completion"),
        (
            tiny_config(max_completion_length=64),
            "a",
            r"max_completion_length: got 64, needs less than the 64 positions",
        ),
    ):
        with pytest.raises(ConfigError, match=named):
            tiny_trainer(config, likes_a, train_dataset=[{"prompt": "a" * 58}, {"prompt": prompt}])
    skip = DataConfig(long_prompts="skip")
    trainer = tiny_trainer(tiny_config(data=skip), likes_a, train_dataset=[{"prompt": "a" * 60}, {"prompt": "b"}])
    assert [row["prompt"] for row in trainer.train_dataset] == ["b"]


def test_the_configuration_is_not_shared(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config()
    expected = copy.deepcopy(config)
    tiny_trainer(config, likes_a).train()
    assert config == expected
