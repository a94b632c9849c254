"""Steps without a pass for the old log-probs: what they learn, and what they report, is what they would with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import asyppo.trainer
from asyppo.algorithm.policy_losses import PolicyTokens, Surrogate
from asyppo.checkpoint import trainer_state
from asyppo.config.old_logprobs import reads_old_logprobs
from asyppo.data.batch import minibatches
from asyppo.models.policy import Policy
from asyppo.rollout.samplers import DecodingSampler, Response
from asyppo.run.progress import Timer

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("fields", "readers"),
    [
        ({"beta": 0.1, "delta": 3.0, "policy_loss": "gspo", "num_mini_batches": 4}, []),
        ({"beta": 0.1, "use_kl_in_reward": True}, ["use_kl_in_reward"]),
        ({"critic": {"policy_inputs": ["entropy"]}}, ["critic.policy_inputs"]),
        ({"critic": {"policy_inputs": ["entropy"]}, "algorithm": "grpo"}, []),
        ({"critic": {"kind": "side"}}, ["critic.kind"]),
        (
            {"importance_sampling_clip_max": 2.0, "mask_truncated_completions": True},
            ["importance_sampling_clip_max", "mask_truncated_completions"],
        ),
    ],
)
def test_what_reads_them(tiny_config: Make, fields: dict[str, Any], readers: list[str]) -> None:
    assert reads_old_logprobs(tiny_config(**fields)) == readers


def likes_a(completions: list[str], **_: Any) -> list[float]:
    """Number of a's, and a little for length."""
    return [c.count("a") + 0.1 * len(c) for c in completions]


def own_loss(tokens: PolicyTokens) -> Surrogate:
    """The ratio, unclipped."""
    return Surrogate(tokens.log_ratio.exp() * tokens.advantage, torch.zeros_like(tokens.keep))


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The policy's gradient at each optimizer step, none of which is taken."""
    seen: list[Tensor] = []

    def capture(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *_: Any) -> float:
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        optimizer.zero_grad()
        return 1.0

    monkeypatch.setattr(asyppo.trainer, "_clip_and_step", capture)
    return seen


@pytest.mark.parametrize(
    ("fields", "mini_batches"),
    [
        ({"algorithm": "asyppo", "diagnostics_steps": 1, "beta": 0.1}, 1),
        ({"algorithm": "ppo"}, 1),
        ({"algorithm": "grpo", "beta": 0.1, "delta": 2.0}, 1),
        ({"algorithm": "rloo", "temperature": 0.7}, 1),
        ({"algorithm": "grpo", "policy_loss": "gspo", "beta": 0.1}, 1),
        ({"algorithm": "grpo", "policy_loss": "cispo"}, 1),
        ({"algorithm": "grpo", "policy_loss": f"{__file__}:own_loss"}, 1),
        ({"algorithm": "asyppo", "sampler": "continuous"}, 1),
        pytest.param({"algorithm": "asyppo", "sampler": "continuous"}, 3, marks=pytest.mark.slow),
        ({"algorithm": "asyppo"}, 3),
        pytest.param({"algorithm": "grpo", "policy_loss": "gspo"}, 3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_gradient_is_that_with_the_pass(
    tiny_config: Make, tiny_trainer: Make, gradients: list[Tensor], fields: dict[str, Any], mini_batches: int
) -> None:
    """And so is what is reported, but for the entropy and the gap where the first of several optimizer steps has them
    of its own responses."""
    results = []
    for source in ("compute", "auto"):
        config = tiny_config(
            **fields,
            num_mini_batches=mini_batches,
            old_per_token_logps=source,
            max_tokens_per_micro_batch=40,
            logging_samples=12,
            entropy_coef=0.1,
        )
        trainer = tiny_trainer(config, likes_a)
        trainer.sampler_agrees = True
        results.append(trainer.step(1))
    (with_pass, without), count = results, len(gradients) // 2
    assert count == mini_batches
    for one, other in zip(gradients[:count], gradients[count:], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    assert "timing_s/old_log_prob" in with_pass.metrics
    assert "timing_s/old_log_prob" not in without.metrics
    of_entropy = {"actor/entropy", "critic/std/corr_entropy", "actor/entropy_filter_entropy_frac"}
    of_first = of_entropy if mini_batches > 1 else set()
    for name, value in with_pass.metrics.items():
        if not name.startswith(("timing_s/", "perf/", "sampling/", "actor/padding_frac")) and name not in of_first:
            assert without.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name
    assert 0 < without.metrics["sampling/sampling_logp_difference/max"] < 1e-4
    for one, other in zip(with_pass.samples, without.samples, strict=True):
        for name in ("logprob", "entropy", "log_ratio"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5)
    if mini_batches == 1:
        assert without.metrics["actor/ppo_kl"] == 0
        assert {x for row in without.samples for x in row["log_ratio"]} == {0.0}


def test_entropy_and_gap_are_of_the_policy_that_sampled(
    tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the responses that the first of the optimizer steps has, which is before the policy has changed."""
    rows: list[Tensor] = []

    def spy(*arguments: Any) -> Any:
        rows.extend(minibatches(*arguments))
        return iter(rows)

    monkeypatch.setattr(asyppo.trainer, "minibatches", spy)
    config = tiny_config(algorithm="grpo", num_mini_batches=4, learning_rate=0.1)
    trainer = tiny_trainer(config, likes_a)
    trainer.sampler_agrees = True
    sampled = trainer.rollout(1, Timer(trainer.device))
    old = trainer.policy.logprobs(sampled.batch, trainer._micro_batches(sampled.batch))
    row = trainer.step(1, sampled).metrics
    first = rows[0]
    mask = sampled.batch.mask[first]
    gap = (old.logprob - sampled.batch.sampler_logprob)[first][mask].abs()
    assert row["actor/entropy"] == pytest.approx(float(old.entropy[first][mask].mean()), rel=1e-5)
    assert row["sampling/sampling_logp_difference/mean"] == pytest.approx(float(gap.mean()), abs=1e-6)
    assert row["sampling/sampling_logp_difference/max"] == pytest.approx(float(gap.max()), abs=1e-6)
    assert abs(row["actor/ppo_kl"]) > 1e-3  # of the later steps


@pytest.mark.parametrize(
    "fields",
    [
        {"use_kl_in_reward": True, "beta": 0.1},
        {"importance_sampling_clip_max": 2.0},
        {"mask_truncated_completions": True},
        {"num_iterations": 2},
        {"critic": {"warmup_steps": 1}},
    ],
    ids=str,
)
def test_where_they_are_read_the_pass_is_made(tiny_config: Make, tiny_trainer: Make, fields: dict[str, Any]) -> None:
    assert "timing_s/old_log_prob" in tiny_trainer(tiny_config(**fields), likes_a).step(1).metrics


def test_the_sampler_is_believed_while_it_agrees(tiny_config: Make, tiny_trainer: Make, tiny_lm: Make) -> None:
    """From the check at the start on, until a step in which the two differ; and again after one in which they do not.
    A checkpoint remembers it."""
    policy = Policy(tiny_lm())
    fields = {"algorithm": "grpo", "num_mini_batches": 2, "sampling_logp_tolerance": 10.0, "save_steps": 2}
    config = tiny_config(max_steps=5, **fields)
    trainer = tiny_trainer(config, likes_a, policy=policy, sampler=(sampler := Shifted(policy)))
    passes, step = [], trainer.step

    def shifting(number: int) -> Any:
        sampler.shift = 0.001 if number in (2, 3) else 0.0
        result = step(number)
        passes.append("timing_s/old_log_prob" in result.metrics)
        return result

    trainer.step = shifting
    run = trainer.train().run.path
    assert passes == [False, False, True, True, False]
    remembered = [trainer_state(run / f"checkpoint-{number}")["sampler_agrees"] for number in (2, 4)]
    assert remembered == [False, True]


class Shifted:
    """Samples from ``policy``, and claims other log-probs where there is a ``shift``."""

    def __init__(self, policy: Policy):
        self.sampler = DecodingSampler(policy.model, eos_token_ids=[1], pad_token_id=0)
        self.shift = 0.0

    def sample(self, prompts: Sequence[Tensor], **options: Any) -> list[Response]:
        """As ``DecodingSampler``."""
        return [replace(r, logprob=r.logprob + self.shift) for r in self.sampler.sample(prompts, **options)]
