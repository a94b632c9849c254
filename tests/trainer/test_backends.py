"""A training step with the policy's ops in their Triton forms is the step with the plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import asyppo.models.policy
from asyppo_kernels import LinearPPOLoss, linear_logprob, linear_ppo_loss
from asyppo_kernels._args import INTERPRETED

Make = Callable[..., Any]

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on CPU, Triton kernels need TRITON_INTERPRET=1")


def varied(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between most responses."""
    return [sum(map(ord, c)) % 7 / 7 for c in completions]


def test_a_step_is_the_same_with_either_backend(
    tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics and weights; and the first update's ratio is 1, though its log-probs came from another op."""

    def step(backend: Any, name: str) -> tuple[dict[str, float], dict[str, torch.Tensor], list[LinearPPOLoss]]:
        outs: list[LinearPPOLoss] = []

        def loss(*args: Any, **kwargs: Any) -> LinearPPOLoss:
            outs.append(linear_ppo_loss(*args, **kwargs, backend=backend))
            return outs[-1]

        def logprob(*args: Any, **kwargs: Any) -> Any:
            return linear_logprob(*args, **kwargs, backend=backend)

        monkeypatch.setattr(asyppo.models.policy, "linear_ppo_loss", loss)
        monkeypatch.setattr(asyppo.models.policy, "linear_logprob", logprob)
        torch.manual_seed(0)
        config = tiny_config(num_mini_batches=2, entropy_coef=0.01, run_name=name)
        trainer = tiny_trainer(config, varied)
        metrics = trainer.step(1).metrics
        return metrics, trainer.policy.model.state_dict(), outs

    metrics, weights, outs = step("torch", "plain")
    fused_metrics, fused_weights, fused_outs = step("triton", "fused")
    for out in (outs[0], fused_outs[0]):
        counted = out.ratio != 0
        assert counted.any()
        assert out.loss != 0
        assert ((out.ratio - 1).abs() <= 1e-4)[counted].all()
        assert not out.clipped.any()
    assert len(outs) == len(fused_outs) >= 2
    for one, other in zip(outs, fused_outs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for name, value in metrics.items():
        if name.startswith(("actor/", "critic/")):
            assert fused_metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), name
    for name, weight in weights.items():
        torch.testing.assert_close(fused_weights[name], weight, rtol=1e-3, atol=1e-4)
