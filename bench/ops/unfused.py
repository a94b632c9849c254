"""The trainer without this project's ops: what one writes in plain torch, to be handed in for them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from asyppo.algorithm.ops import Ops
from asyppo_kernels import AgreementMasks, EnsembleGAE, EnsembleValue, LinearLogprob, LinearPPOLoss
from bench.ops.agreement_masks import ranks_by_sort
from bench.ops.ensemble_gae import gae_by_loop


def logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> LinearLogprob:
    """Whole logits, in float32, of a head without a softcap."""
    assert softcap is None
    if compute_dtype is not None:
        hidden, weight = hidden.to(compute_dtype), weight.to(compute_dtype)
        bias = None if bias is None else bias.to(compute_dtype)
    logp = F.log_softmax(F.linear(hidden, weight, bias).float() / temperature, dim=-1)
    return LinearLogprob(logp.gather(1, target[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1))


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    token_weight: Tensor,
    *,
    advantage_keep: Tensor,
    entropy_keep: Tensor,
    clip_low: float,
    clip_high: float,
    entropy_coef: float,
    ref_logprob: Tensor | None,
    rollout_weight: Tensor | None,
    dual_clip: float | None,
    kl_coef: float,
    kl_bias_correction: bool,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    compute_dtype: torch.dtype | None,
) -> LinearPPOLoss:
    """The clipped surrogate and the entropy bonus over whole logits; what the update here does without is left out."""
    assert ref_logprob is None
    assert rollout_weight is None
    assert dual_clip is None
    assert not kl_coef
    logprob, entropy = logprobs(
        hidden, weight, target, bias=bias, temperature=temperature, softcap=softcap, compute_dtype=compute_dtype
    )
    assert entropy is not None
    ratio = torch.exp(logprob - old_logprob)
    inside = ratio.clamp(1 - clip_low, 1 + clip_high)
    token_loss = -torch.minimum(ratio * advantage, inside * advantage) * advantage_keep
    loss = (token_weight * (token_loss - entropy_coef * entropy * entropy_keep)).sum()
    clipped = (ratio * advantage > inside * advantage) & advantage_keep
    return LinearPPOLoss(loss, logprob.detach(), entropy.detach(), ratio.detach(), clipped)


def values(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> EnsembleValue:
    """A linear head a critic, one after another."""
    biases = [None] * len(hidden) if bias is None else [b[None] for b in bias]
    heads = zip(hidden, weight, biases, strict=True)
    value = torch.stack([F.linear(h, w[None].to(h.dtype), b).squeeze(-1) for h, w, b in heads]).float()
    scores = value.detach()
    return EnsembleValue(value, scores.mean(0), scores.std(0, correction=0))


def gae(
    value: Tensor, reward: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95, value_lam: float = 1.0
) -> EnsembleGAE:
    """A Python loop over time."""
    found = gae_by_loop({"value": value, "reward": reward, "mask": mask}, gamma, lam, value_lam)
    return EnsembleGAE(**found)


def masks(std: Tensor, mask: Tensor, *, advantage_fraction: float, entropy_fraction: float) -> AgreementMasks:
    """A sort. ``torch.quantile`` interpolates, drops another token or two, and takes at most 2^24."""
    low, high = ranks_by_sort(std, mask, advantage_fraction, entropy_fraction)
    return AgreementMasks(mask & (std >= low), mask & (std <= high), low, high)


UNFUSED = Ops(
    linear_logprob=logprobs, linear_ppo_loss=policy_loss, ensemble_value=values, ensemble_gae=gae, agreement_masks=masks
)
