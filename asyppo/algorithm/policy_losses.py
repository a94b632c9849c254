"""Step 6 of AsyPPO: what the policy update maximises, token by token, and what others maximise instead.

A policy loss is a pure function from ``PolicyTokens`` to a ``Surrogate``. Token weights, the entropy bonus with its
filter and the KL penalty are added around it, by ``policy_loss``, the same for all. ``ppo`` is not among the functions:
it is the fused op ``asyppo_kernels.linear_ppo_loss``, which forms the same sum without the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asyppo.algorithm.options import PolicyLossOptions
from asyppo_kernels import LinearPPOLoss

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to ± this, as in the fused op."""


@dataclass(frozen=True)
class PolicyTargets:
    """What the policy learns from, of every token: on the response grid [B, T], or of N tokens in a row [N]."""

    old_logprob: Tensor | None
    """float32: log-prob under the policy that sampled; None: the policy is still that one, and the ratio is 1."""
    advantage: Tensor
    """float32."""
    token_weight: Tensor
    """float32: weight in the loss; it carries every normalisation, and 0 leaves a token out."""
    advantage_keep: Tensor
    """bool: I^A."""
    entropy_keep: Tensor
    """bool: I^H."""
    ref_logprob: Tensor | None = None
    """float32: log-prob under the reference; None without a KL penalty."""
    rollout_weight: Tensor | None = None
    """float32: importance weight of the sampler's numerics; None weights nothing."""

    def at(self, index: Any) -> PolicyTargets:
        """Return those of the tokens at ``index``."""
        return PolicyTargets(
            old_logprob=None if self.old_logprob is None else self.old_logprob[index],
            advantage=self.advantage[index],
            token_weight=self.token_weight[index],
            advantage_keep=self.advantage_keep[index],
            entropy_keep=self.entropy_keep[index],
            ref_logprob=None if self.ref_logprob is None else self.ref_logprob[index],
            rollout_weight=None if self.rollout_weight is None else self.rollout_weight[index],
        )

    def old(self, logprob: Tensor) -> Tensor:
        """Return the log-prob under the policy that sampled, given that under the policy as it is, detached."""
        return logprob.detach() if self.old_logprob is None else self.old_logprob


@dataclass(frozen=True)
class PolicyTokens:
    """What a policy loss is made of: N tokens of a micro-batch. A response is never split over micro-batches."""

    logprob: Tensor
    """float32 [N], in nats, differentiable."""
    entropy: Tensor
    """float32 [N], in nats, differentiable."""
    old_logprob: Tensor
    """float32 [N]: log-prob under the policy that sampled."""
    advantage: Tensor
    """float32 [N]; 0 where it is not kept."""
    keep: Tensor
    """bool [N]: I^A, False where the token has no weight."""
    importance_weight: Tensor
    """float32 [N]: what the surrogate is to be multiplied by; 1 without a correction of the sampler."""
    response: Tensor
    """int64 [N], in 0 … R - 1: which response of the micro-batch a token belongs to."""
    counted: Tensor
    """bool [N]: tokens with a weight. Others hold zeros."""
    options: PolicyLossOptions

    @property
    def log_ratio(self) -> Tensor:
        """log π/π_old, float32 [N], differentiable, in ± ``LOG_RATIO_LIMIT``."""
        return (self.logprob - self.old_logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)

    def response_mean(self, value: Tensor) -> Tensor:
        """Return, at each token, the mean of ``value`` [N] over its response's tokens that count."""
        size = int(self.response.max()) + 1 if len(self.response) else 0
        total = value.new_zeros(size).index_add(0, self.response, torch.where(self.counted, value, 0.0))
        count = value.new_zeros(size).index_add(0, self.response, self.counted.to(value.dtype))
        return (total / count.clamp(min=1))[self.response]


@dataclass(frozen=True)
class Surrogate:
    """What a policy loss returns: what is to be maximised, and where the clip stopped it."""

    value: Tensor
    """float32 [N], differentiable, multiplied by the importance weight."""
    clipped: Tensor
    """bool [N]: the clip, dual or not, has taken the token's gradient, or what stands for it, away."""
    dual_clipped: Tensor | None = None
    """bool [N]: of these, where the dual clip did; None: nowhere."""
    ratio: Tensor | None = None
    """float32 [N], differentiable: what the KL penalty is multiplied by with ``use_bias_correction_kl``; None: the
    token's own ratio."""


PolicyLoss = Callable[[PolicyTokens], Surrogate]


class PolicyLossResult(NamedTuple):
    """The loss of N tokens and, detached, [N], what is reported of it. Tokens without a weight hold zeros."""

    loss: Tensor
    """float32 scalar, differentiable."""
    logprob: Tensor
    """float32, in nats."""
    entropy: Tensor
    """float32, in nats."""
    ratio: Tensor
    """float32: π/π_old of the token."""
    clipped: Tensor
    """bool: the token's surrogate has no gradient, since clip or dual clip binds, or the clamp of the log-ratio."""
    dual_clipped: Tensor
    """bool: of these, where the dual clip binds."""
    kl: Tensor
    """float32: the KL penalty as it stands in the loss, before its coefficient; zeros without one."""


def cispo(tokens: PolicyTokens) -> Surrogate:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equation 4): the clipped ratio, held constant, weights A log π, so that no
    token loses its gradient."""
    ratio = tokens.log_ratio.detach().exp()
    weight = ratio.clamp(1 - tokens.options.epsilon, 1 + tokens.options.epsilon_high)
    return Surrogate(tokens.importance_weight * weight * tokens.advantage * tokens.logprob, ratio != weight)


def gspo(tokens: PolicyTokens) -> Surrogate:
    """GSPO (arXiv 2507.18071, equation 5): PPO's clip on one ratio a response, the geometric mean of its tokens'."""
    ratio = tokens.response_mean(tokens.log_ratio).exp()
    return replace(clipped_surrogate(ratio, tokens), ratio=ratio)


def clipped_surrogate(ratio: Tensor, tokens: PolicyTokens) -> Surrogate:
    """PPO's min(r A, clip(r) A) of ``ratio`` [N], with the dual clip ``delta``: where A < 0, at least delta A."""
    a, options = tokens.advantage, tokens.options
    value = torch.minimum(ratio * a, ratio.clamp(1 - options.epsilon, 1 + options.epsilon_high) * a)
    clipped = torch.where(a > 0, ratio > 1 + options.epsilon_high, ratio < 1 - options.epsilon)
    dual_clipped = None
    if options.delta is not None:
        value = torch.where(a < 0, value.maximum(options.delta * a), value)
        dual_clipped = (a < 0) & (ratio > options.delta)
        clipped = clipped | dual_clipped
    return Surrogate(tokens.importance_weight * value, clipped, dual_clipped)


POLICY_LOSSES: dict[str, PolicyLoss | None] = {"ppo": None, "cispo": cispo, "gspo": gspo}
"""The built-in ones by name. None: the fused op's own."""


def policy_loss(
    surrogate: PolicyLoss,
    logprob: Tensor,
    entropy: Tensor,
    targets: PolicyTargets,
    response: Tensor,
    options: PolicyLossOptions,
) -> PolicyLossResult:
    """Return the loss and statistics of N tokens, as ``asyppo_kernels.linear_ppo_loss`` does for its own surrogate.

    loss = Σ w (-I^A s - entropy_coef I^H H + kl_coef k3), with s of ``surrogate``, and k3 times its ratio with
    ``use_bias_correction_kl``; log-prob and entropy float32 [N], differentiable. What does not count is not read: NaN
    there changes nothing. Raises ValueError where ``surrogate`` returns something else than N numbers.
    """
    weight = targets.token_weight
    counted = weight != 0
    keep = counted & targets.advantage_keep
    importance = torch.ones_like(logprob) if targets.rollout_weight is None else targets.rollout_weight
    tokens = PolicyTokens(
        logprob=logprob,
        entropy=entropy,
        old_logprob=targets.old(logprob).where(counted, 0.0),
        advantage=targets.advantage.where(keep, 0.0),
        keep=keep,
        importance_weight=importance.where(keep, 0.0),
        response=response,
        counted=counted,
        options=options,
    )
    result = surrogate(tokens)
    given = {name: getattr(result, name) for name in ("value", "clipped", "dual_clipped", "ratio")}
    for name, got in given.items():
        if got is not None and got.shape != logprob.shape:
            raise ValueError(f"policy_loss: {name} has shape {list(got.shape)}, needs [N] = {list(logprob.shape)}")
    ratio = tokens.log_ratio.exp()
    token_loss = -result.value.where(keep, 0.0)
    if options.entropy_coef:
        token_loss = token_loss - options.entropy_coef * entropy.where(counted & targets.entropy_keep, 0.0)
    kl = torch.zeros_like(logprob)
    if targets.ref_logprob is not None and options.kl_coef:
        kl = k3(targets.ref_logprob.where(counted, 0.0), logprob)
        if options.use_bias_correction_kl:
            kl = kl * (ratio if result.ratio is None else result.ratio)
        token_loss = token_loss + options.kl_coef * kl
    moves = keep & (tokens.advantage != 0)
    nowhere = torch.zeros_like(keep)
    return PolicyLossResult(
        (weight * token_loss).where(counted, 0.0).sum(),
        logprob.detach(),
        entropy.detach(),
        ratio.detach().where(counted, 0.0),
        result.clipped.detach() & moves,
        nowhere if result.dual_clipped is None else result.dual_clipped.detach() & moves,
        kl.detach().where(counted, 0.0),
    )


def result_of_fused(fused: LinearPPOLoss, targets: PolicyTargets, options: PolicyLossOptions) -> PolicyLossResult:
    """Return what the fused op found, with what follows from that."""
    dual_clipped = torch.zeros_like(fused.clipped)
    if options.delta is not None:  # the ratio is above the bound, and the upper clip leaves negative advantages alone
        dual_clipped = fused.clipped & (targets.advantage < 0) & (fused.ratio > options.delta)
    kl = torch.zeros_like(fused.logprob)
    if targets.ref_logprob is not None and options.kl_coef:
        counted = targets.token_weight != 0
        kl = k3(targets.ref_logprob.where(counted, 0.0), fused.logprob).where(counted, 0.0)
        if options.use_bias_correction_kl:
            kl = kl * fused.ratio
    return PolicyLossResult(*fused, dual_clipped, kl)


def k3(ref_logprob: Tensor, logprob: Tensor) -> Tensor:
    """Return exp(d) - d - 1, d = ref_logprob - logprob in ± ``LOG_RATIO_LIMIT``: the estimate of KL(π ‖ π_ref)."""
    difference = (ref_logprob - logprob).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return difference.expm1() - difference


def importance_weights(old_logprob: Tensor, sampler_logprob: Tensor, clip_max: float) -> Tensor:
    """Return π_old / π_sampler of each token, at most ``clip_max``; log-probs float32, in nats, of one shape.

    Truncated importance sampling per token (TRL's mode ``token_truncate``): a batch is drawn from what the sampler
    computes, which differs from what the trainer computes for the same weights.
    """
    return (old_logprob - sampler_logprob).clamp(-20, 20).exp().clamp(max=clip_max)
