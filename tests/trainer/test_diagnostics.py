"""What a run says of its critics and masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from asyppo.algorithm.advantage import LearningSignal
from asyppo.metrics.diagnostics import (
    correlation,
    critic_diagnostics,
    explained_variance,
    mask_diagnostics,
    masked_gradient_fractions,
)

Make = Callable[..., Any]


def test_explained_variance_by_hand() -> None:
    returns, mask = torch.tensor([[0.0, 1.0, math.nan]]), torch.tensor([[True, True, False]])
    # Errors -0.5 and 0.5: variance 0.25, as that of the returns.
    assert float(explained_variance(torch.tensor([[0.5, 0.5, 9.0]]), returns, mask)) == pytest.approx(0.0)
    assert float(explained_variance(torch.tensor([[0.25, 0.75, 9.0]]), returns, mask)) == pytest.approx(0.75)
    # A constant shift is no error of it.
    assert float(explained_variance(returns + 3, returns, mask)) == pytest.approx(1.0)
    assert math.isnan(explained_variance(returns, torch.ones(1, 3), mask))


def test_correlation_is_pearsons() -> None:
    x, y = torch.randn(2, 50), torch.randn(2, 50)
    mask = torch.rand(2, 50) < 0.7
    y = torch.where(mask, y + x, math.nan)
    expected = torch.corrcoef(torch.stack([x[mask], y[mask]]))[0, 1]
    assert float(correlation(x, y, mask)) == pytest.approx(float(expected), abs=1e-5)
    assert math.isnan(correlation(torch.ones(2, 50), x, mask))


def signal_of(mask: torch.Tensor, **changes: Any) -> LearningSignal:
    zero = torch.zeros(mask.shape)
    fields = {
        "advantage": torch.where(mask, 1.0, 0.0),
        "advantage_keep": mask,
        "entropy_keep": mask,
        "raw_advantage": zero,
        "returns": zero,
        "value": zero,
        "values": zero[None],
        "std": zero,
        "low": torch.tensor(0.0),
        "high": torch.tensor(0.0),
    }
    return LearningSignal(**(fields | changes))


def test_disagreement_that_is_the_error(ragged_batch: Make) -> None:
    batch = ragged_batch()
    returns = torch.randn_like(batch.reward)
    error = torch.rand_like(returns)
    values = torch.stack([returns + error, returns - error, returns + error])
    signal = signal_of(batch.mask, returns=returns, value=returns + error, values=values, std=2 * error)
    row = critic_diagnostics(signal, batch.mask, -error, batch.mask)
    assert row["critic/std/corr_abs_error"] == pytest.approx(1.0, abs=1e-4)
    assert row["critic/std/corr_entropy"] == pytest.approx(-1.0, abs=1e-4)
    assert row["critic/0/vf_explained_var"] == row["critic/2/vf_explained_var"]
    assert set(row) >= {f"critic/{m}/vf_explained_var" for m in range(3)}


def test_what_the_masks_take_by_position() -> None:
    learned = torch.arange(6) < torch.tensor([[6], [3], [1]])
    std = torch.where(learned, torch.tensor([1.0, 2, 3, 5, 7, 7]), math.nan)
    keep = learned & (torch.arange(6) > torch.tensor([[0], [1], [0]]))  # drops 1, 2 and 1 tokens
    entropy = torch.where(learned, torch.tensor([0.0, 0.5, 0.5, 1, 1, 1]), math.nan)
    advantage = torch.where(learned, torch.tensor([2.0, -1, 1, 1, -1, 0]), math.nan)
    values = torch.zeros(2, 3, 6)
    signal = signal_of(
        learned,
        advantage=advantage,
        advantage_keep=keep,
        entropy_keep=learned & (std < 3),
        std=std,
        values=values,
    )
    row = mask_diagnostics(signal, learned, entropy, learned)
    assert row["actor/adv_mask_advantage_frac"] == pytest.approx(7 / 12)
    assert row["actor/entropy_filter_entropy_frac"] == pytest.approx(4 / 5)
    places = ("tokens_1", "tokens_2", "tokens_3_4", "tokens_5_8")
    assert [row[f"critic/std/{place}"] for place in places] == pytest.approx([1, 2, 11 / 3, 7])
    assert [row[f"actor/adv_mask_frac/{place}"] for place in places] == pytest.approx([1, 1 / 2, 0, 0])
    assert [row[f"actor/entropy_filter_frac/{place}"] for place in places] == [0, 0, 1, 1]
    assert len(row) == 14
    known = learned & (torch.arange(3)[:, None] == 1)  # entropies 0, 0.5 and 0.5, of which the last is filtered
    row = mask_diagnostics(replace(signal, values=values[:1]), learned, entropy, known)
    assert row == pytest.approx({"actor/adv_mask_advantage_frac": 7 / 12, "actor/entropy_filter_entropy_frac": 1 / 2})


def test_the_part_of_the_gradient_that_a_mask_removes(
    tiny_trainer: Make, tiny_config: Make, ragged_batch: Make
) -> None:
    config = tiny_config()
    trainer, batch = tiny_trainer(config, lambda completions, **_: [0.0] * len(completions)), ragged_batch()
    policy = trainer.policy

    def fractions(signal: LearningSignal) -> dict[str, float]:
        micros = list(trainer._micro_batches(batch))
        old, _ = policy.logprobs(batch, micros)
        return masked_gradient_fractions(policy, trainer._objective(batch, signal, old), batch, micros)

    nothing, first = torch.zeros_like(batch.mask), batch.mask.clone()
    first[3:] = False
    none = fractions(signal_of(batch.mask))
    assert none == {"actor/adv_mask_grad_frac": 0.0, "actor/entropy_filter_grad_frac": 0.0}
    everything = fractions(signal_of(batch.mask, advantage_keep=nothing, entropy_keep=nothing))
    assert everything["actor/adv_mask_grad_frac"] == pytest.approx(1.0)
    assert everything["actor/entropy_filter_grad_frac"] == pytest.approx(1.0)
    assert all(p.grad is None for p in policy.parameters())

    # By hand, at ratio 1: the gradient of -A log π over the tokens left out, and over all of them.
    advantage = torch.randn_like(batch.reward)
    got = fractions(signal_of(batch.mask, advantage=advantage, advantage_keep=batch.mask & ~first))
    norms = []
    for chosen in (first, batch.mask):
        loss = torch.zeros(())
        for b in range(len(batch)):
            prompt, length = int(batch.prompt_length[b]), int(batch.response_length[b])
            ids = batch.tokens[b : b + 1, : prompt + length]
            logprob = policy.model(input_ids=ids).logits[0, prompt - 1 : -1].log_softmax(-1)
            logprob = logprob.gather(1, ids[0, prompt:, None])[:, 0]
            loss = loss - (chosen[b, :length] * advantage[b, :length] * logprob).sum() / length
        policy.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None]))
    assert got["actor/adv_mask_grad_frac"] == pytest.approx(float(norms[0] / norms[1]), rel=1e-4)
    assert got["actor/entropy_filter_grad_frac"] == 0.0


def test_in_a_run(tiny_trainer: Make, tiny_config: Make) -> None:
    """They change nothing that is learned."""
    rows = []
    for every in (0, 2):
        config = tiny_config(max_steps=2, diagnostics_steps=every, run_name=f"run-{every}")
        trainer = tiny_trainer(config, lambda completions, **_: [float(c.count("a")) for c in completions])
        rows.append([trainer.step(step).metrics for step in (1, 2)])
    assert "actor/adv_mask_grad_frac" not in rows[1][0]
    assert 0 <= rows[1][1]["actor/adv_mask_grad_frac"] <= 2
    for name in ("actor/pg_loss", "actor/grad_norm", "critic/vf_loss"):
        assert rows[0][1][name] == rows[1][1][name]
