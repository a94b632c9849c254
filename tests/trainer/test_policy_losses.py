"""Policy losses beside the fused one: by hand, and against the fused op where they mean the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from asyppo.algorithm.options import PolicyLossOptions
from asyppo.algorithm.policy_losses import (
    POLICY_LOSSES,
    PolicyTargets,
    PolicyTokens,
    Surrogate,
    cispo,
    clipped_surrogate,
    gspo,
    policy_loss,
    result_of_fused,
)
from asyppo_kernels import linear_logprob, linear_ppo_loss

Make = Callable[..., Any]
RESPONSE = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])


def plain_ppo(tokens: PolicyTokens) -> Surrogate:
    """What the fused op maximises, as a function."""
    return clipped_surrogate(tokens.log_ratio.exp(), tokens)


def targets(seed: int = 0) -> PolicyTargets:
    """Of nine tokens of three responses: everything that counts, and NaN in what does not."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(9, generator=generator)

    weight = torch.rand(9, generator=generator)
    weight[4] = 0.0
    keep = torch.tensor([True, True, False, True, True, True, False, True, True])
    made = PolicyTargets(
        old_logprob=-2 + 0.3 * draw(),
        advantage=draw(),
        token_weight=weight,
        advantage_keep=keep,
        entropy_keep=torch.tensor([True, False, True, True, True, False, True, True, True]),
        ref_logprob=-2 + 0.3 * draw(),
        rollout_weight=torch.rand(9, generator=generator),
    )
    for x in (made.old_logprob, made.ref_logprob, made.advantage, made.rollout_weight):
        assert x is not None
        x[4] = math.nan
    made.advantage[~keep] = math.nan
    made.rollout_weight[~keep] = math.nan  # type: ignore[index]
    return made


def head(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and targets of nine tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(9, 6, generator=generator), torch.randn(11, 6, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(11, (9,), generator=generator)


@pytest.mark.parametrize(("delta", "correction"), [(None, True), (1.5, False), (1.5, True)])
def test_around_ppo_it_is_the_fused_op(delta: float | None, correction: bool) -> None:
    """Loss, statistics and gradients: entropy bonus, KL, importance weights, masks, rows without a weight."""
    options = PolicyLossOptions(
        epsilon=0.1,
        epsilon_high=0.2,
        delta=delta,
        entropy_coef=0.3,
        kl_coef=0.2,
        use_bias_correction_kl=correction,
    )
    of = targets()
    of = replace(of, old_logprob=of.old_logprob - 1)  # ratios on both sides of the clips
    hidden, weight, target = head()
    out = linear_logprob(hidden, weight, target.where(of.token_weight != 0, -100))
    assert out.entropy is not None
    got = policy_loss(plain_ppo, out.logprob, out.entropy, of, RESPONSE, options)
    fused = linear_ppo_loss(
        hidden,
        weight,
        target,
        of.old_logprob,
        of.advantage,
        of.token_weight,
        advantage_keep=of.advantage_keep,
        entropy_keep=of.entropy_keep,
        ref_logprob=of.ref_logprob,
        rollout_weight=of.rollout_weight,
        clip_low=0.1,
        clip_high=0.2,
        dual_clip=delta,
        entropy_coef=0.3,
        kl_coef=0.2,
        kl_bias_correction=correction,
    )
    want = result_of_fused(fused, of, options)
    assert bool(want.clipped.any())
    assert bool(want.dual_clipped.any()) == (delta is not None)
    assert not bool((want.dual_clipped & ~want.clipped).any())
    for name, one, other in zip(want._fields, got, want, strict=True):
        if one.dtype == torch.bool:
            assert torch.equal(one, other), name
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(got.loss, (hidden, weight)), torch.autograd.grad(fused.loss, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_the_kl_penalty_is_trls(name: str, correction: bool) -> None:
    """Value and gradient of what ``beta`` adds to the loss, by the lines of TRL's GRPOTrainer: k3, with
    ``use_bias_correction_kl`` times the importance weight, which is a response's where that is what is clipped."""
    of = targets()
    logprob = (-2 + 0.3 * torch.randn(9, generator=torch.Generator().manual_seed(1))).requires_grad_()
    counted = of.token_weight != 0
    added = []
    for kl_coef in (0.2, 0.0):
        options = PolicyLossOptions(kl_coef=kl_coef, use_bias_correction_kl=correction)
        surrogate = POLICY_LOSSES[name] or plain_ppo
        added.append(policy_loss(surrogate, logprob, torch.ones(9), of, RESPONSE, options).loss)
    got = added[0] - added[1]

    assert of.ref_logprob is not None
    ref_logprob, old_logprob = of.ref_logprob.where(counted, 0.0), of.old_logprob.where(counted, 0.0)
    per_token_kl = torch.exp(ref_logprob - logprob) - (ref_logprob - logprob) - 1
    if correction:
        log_importance_weights = logprob - old_logprob
        if name == "gspo":
            of_response = torch.nn.functional.one_hot(RESPONSE).float() * counted[:, None]
            log_importance_weights = ((log_importance_weights @ of_response) / of_response.sum(0))[RESPONSE]
        per_token_kl = per_token_kl * torch.exp(log_importance_weights)
    want = (0.2 * of.token_weight * per_token_kl)[counted].sum()

    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    slopes = [torch.autograd.grad(x, logprob)[0] for x in (got, want)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


def test_on_policy_the_corrected_penalty_has_the_gradient_of_the_kl_divergence() -> None:
    """In expectation over the policy's tokens; plain k3 has another."""
    generator = torch.Generator().manual_seed(0)
    logits, ref = (
        torch.randn(5, generator=generator).requires_grad_(),
        torch.randn(5, generator=generator).log_softmax(0),
    )
    logprob = logits.log_softmax(0)
    [want] = torch.autograd.grad((logprob.exp() * (logprob - ref)).sum(), logits)
    one, yes = torch.zeros(5), torch.ones(5, dtype=torch.bool)
    of = PolicyTargets(logprob.detach(), one, logprob.detach().exp(), yes, yes, ref)
    gradients = {}
    for correction in (True, False):
        options = PolicyLossOptions(kl_coef=1.0, use_bias_correction_kl=correction)
        loss = policy_loss(plain_ppo, logits.log_softmax(0), one, of, torch.arange(5), options).loss
        [gradients[correction]] = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradients[True], want, rtol=1e-4, atol=1e-6)
    assert float((gradients[False] - want).abs().max()) > 0.1


def tokens(log_ratio: list[float], advantage: list[float], response: list[int], **changes: Any) -> PolicyTokens:
    """Tokens with these log-ratios."""
    n = len(log_ratio)
    logprob = torch.full((n,), -1.0)
    everything = torch.ones(n, dtype=torch.bool)
    made = PolicyTokens(
        logprob=logprob.requires_grad_(),
        entropy=torch.ones(n),
        old_logprob=logprob.detach() - torch.tensor(log_ratio),
        advantage=torch.tensor(advantage),
        keep=everything,
        importance_weight=torch.ones(n),
        response=torch.tensor(response),
        counted=everything,
        options=PolicyLossOptions(epsilon=0.2, epsilon_high=0.3),
    )
    return replace(made, **changes)


def test_cispo_by_hand() -> None:
    """Ratios 1, 2 and a half: weights 1, 1.3 and 0.8, and the gradient of log π everywhere."""
    made = tokens([0.0, math.log(2), math.log(0.5)], [1.0, 2.0, -3.0], [0, 0, 0])
    out = cispo(made)
    torch.testing.assert_close(out.value, torch.tensor([-1.0, -2.6, 2.4]))
    assert out.clipped.tolist() == [False, True, True]
    [gradient] = torch.autograd.grad(out.value.sum(), made.logprob)
    torch.testing.assert_close(gradient, torch.tensor([1.0, 2.6, -2.4]))


def test_gspo_by_hand() -> None:
    """Two responses, whose ratios are exp of the mean of their tokens' log-ratios; a token without a weight is in no
    mean."""
    made = tokens(
        [0.4, 0.2, 9.0, -0.6, -0.2],
        [1.0, -1.0, 5.0, 1.0, -1.0],
        [0, 0, 0, 1, 1],
        counted=torch.tensor([True, True, False, True, True]),
    )
    out = gspo(made)
    up, down = math.exp(0.3), math.exp(-0.4)
    expected = [1.3, -up, 1.3 * 5, down, -0.8]
    torch.testing.assert_close(out.value, torch.tensor(expected))
    assert out.clipped[[0, 1, 3, 4]].tolist() == [True, False, False, True]
    [gradient] = torch.autograd.grad(out.value[[0, 1, 3, 4]].sum(), made.logprob)
    # Only token 1 of response 0 and token 3 of response 1 are not clipped; each moves with its whole response.
    torch.testing.assert_close(gradient, torch.tensor([-up / 2, -up / 2, 0.0, down / 2, down / 2]))


@pytest.mark.parametrize("name", ["cispo", "gspo"])
def test_at_ratio_one_all_losses_have_ppos_gradient(name: str) -> None:
    """Of a response's constant advantage."""
    made = tokens([0.0] * 5, [2.0, 2.0, 2.0, -1.0, -1.0], [0, 0, 0, 1, 1])
    surrogate = POLICY_LOSSES[name]
    assert surrogate is not None
    gradients = [torch.autograd.grad(f(made).value.sum(), made.logprob)[0] for f in (plain_ppo, surrogate)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_a_loss_of_another_shape_is_refused() -> None:
    of, (hidden, weight, target) = targets(), head()
    out = linear_logprob(hidden, weight, target)
    assert out.entropy is not None

    def summed(made: PolicyTokens) -> Surrogate:
        return Surrogate(made.logprob.sum(), made.keep)

    with pytest.raises(ValueError, match=r"policy_loss: value has shape \[\], needs \[N\] = \[9\]"):
        policy_loss(summed, out.logprob, out.entropy, of, RESPONSE, PolicyLossOptions())


@pytest.mark.parametrize("name", ["ppo", "cispo", "gspo"])
def test_in_the_loop(tiny_config: Make, tiny_trainer: Make, name: str) -> None:
    """Gradients do not depend on micro-batches, and the trainer, its metrics and diagnostics take any of them."""
    rows = []
    for max_tokens in (10_000, 20):
        config = tiny_config(
            policy_loss=name, num_iterations=2, beta=0.1, diagnostics_steps=1, max_tokens_per_micro_batch=max_tokens
        )
        trainer = tiny_trainer(config, lambda completions, **_: [float(c.count("a")) for c in completions])
        rows.append(trainer.step(1).metrics)
    assert rows[0]["actor/grad_norm"] > 0
    for key in ("actor/grad_norm", "actor/pg_loss", "actor/ppo_kl", "actor/kl_loss", "actor/adv_mask_grad_frac"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=1e-3, abs=1e-5), key
