"""What a researcher asks of critics and masks: do critics predict, where do they disagree, what is masked away?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from asyppo.algorithm.masked import masked_mean, masked_moments, masked_sum
from asyppo.algorithm.signal import LearningSignal
from asyppo.data.batch import Batch, MicroBatch
from asyppo.distributed.sharding import between_replicas_once, total_norms
from asyppo.models.policy import Objective, Policy

Row = dict[str, float]


def critic_diagnostics(signal: LearningSignal, mask: Tensor, entropy: Tensor, known: Tensor) -> Row:
    """Explained variance of each critic, and Pearson's correlation of the disagreement σ with the error |V̄ - R|, over
    the tokens in ``mask`` bool [B, T]; and with the policy's ``entropy`` [B, T], over those where that is ``known``
    (bool [B, T]). NaN where something does not vary."""
    row = {
        f"critic/{m}/vf_explained_var": explained_variance(value, signal.returns, mask)
        for m, value in enumerate(signal.values)
    }
    row["critic/std/corr_abs_error"] = correlation(signal.std, (signal.value - signal.returns).abs(), mask)
    row["critic/std/corr_entropy"] = correlation(signal.std, entropy, known)
    return {name: float(number) for name, number in row.items()}


def mask_diagnostics(signal: LearningSignal, learned: Tensor, entropy: Tensor, known: Tensor) -> Row:
    """What the two masks take of the tokens in ``learned`` bool [B, T], which losses count.

    ``actor/adv_mask_advantage_frac`` is of the sum of |advantage|, ``actor/entropy_filter_entropy_frac`` of the sum of
    the policy's ``entropy`` [B, T] where that is ``known`` (bool [B, T]); NaN where that is 0. Of two critics or more
    also by position: σ, and the shares of tokens that each mask takes, at the first token of the responses, the second,
    the third and fourth, the fifth to eighth, and so on, as ``critic/std/tokens_5_8``, ``actor/adv_mask_frac/…`` and
    ``actor/entropy_filter_frac/…``; an environment's tokens are counted, too.
    """
    dropped = [learned & ~keep for keep in (signal.advantage_keep, signal.entropy_keep)]
    shares = []
    weights = ((signal.advantage.abs(), learned), (entropy, learned & known))
    for drop, (weight, counted) in zip(dropped, weights, strict=True):
        whole = masked_sum(weight, counted)
        shares.append(masked_sum(weight, drop & counted) / torch.where(whole > 0, whole, torch.nan))
    names = ["actor/adv_mask_advantage_frac", "actor/entropy_filter_entropy_frac"]
    row = dict(zip(names, torch.stack(shares).tolist(), strict=True))
    if len(signal.values) < 2:
        return row
    columns = [learned, torch.where(learned, signal.std, 0.0), *dropped]
    numbers = range(1, learned.shape[1] + 1)
    stretch = torch.tensor([(number - 1).bit_length() for number in numbers], device=learned.device)
    count = int((learned.shape[1] - 1).bit_length()) + 1
    # A product, since sums by index are not deterministic on a GPU.
    chosen = (stretch[:, None] == torch.arange(count, device=learned.device)).float()
    sums = torch.stack([column.float().sum(dim=0) for column in columns]) @ chosen
    for i, (tokens, std, masked, filtered) in enumerate(sums.T.tolist()):
        place = f"tokens_{2 ** (i - 1) + 1}_{2**i}" if i > 1 else f"tokens_{i + 1}"
        if tokens:
            row[f"critic/std/{place}"] = std / tokens
            row[f"actor/adv_mask_frac/{place}"] = masked / tokens
            row[f"actor/entropy_filter_frac/{place}"] = filtered / tokens
    return row


def explained_variance(value: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the tokens in ``mask``; NaN where returns do not vary."""
    _, error = masked_moments(returns - value, mask)
    _, variance = masked_moments(returns, mask)
    return 1 - error / torch.where(variance > 1e-8, variance, torch.nan)


def correlation(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Pearson's correlation of ``x`` and ``y`` over the tokens in ``mask``; NaN where one of them does not vary."""
    mean_x, variance_x = masked_moments(x, mask)
    mean_y, variance_y = masked_moments(y, mask)
    spread = (variance_x * variance_y).sqrt()
    return masked_mean((x - mean_x) * (y - mean_y), mask) / torch.where(spread > 1e-12, spread, torch.nan)


def masked_gradient_fractions(policy: Policy, objective: Objective, batch: Batch, micros: Sequence[MicroBatch]) -> Row:
    """Norm of the part of the policy's gradient that each mask removes, over the norm of the whole, at ρ = 1.

    ``actor/adv_mask_grad_frac``: of the gradient of the surrogate, what tokens outside I^A would add;
    ``actor/entropy_filter_grad_frac``: of the gradient of the entropy bonus, what tokens outside I^H would add. Takes
    four backward passes over ``batch``, whose targets [B, T] are the ``objective``'s, and leaves no gradient behind.
    NaN where the whole is 0.
    """
    targets, everything = objective.targets, batch.learned
    plain = replace(targets, ref_logprob=None, rollout_weight=None)
    options = replace(objective.options, kl_coef=0.0, delta=None)
    surrogate = replace(objective, targets=plain, options=replace(options, entropy_coef=0.0))
    no_advantage = replace(plain, advantage=torch.zeros_like(targets.advantage))
    entropy = Objective(no_advantage, replace(options, entropy_coef=1.0))

    def norm(part: Objective, keep: Tensor) -> Tensor:
        masked = replace(part.targets, advantage_keep=keep, entropy_keep=keep)
        policy.zero_grad(set_to_none=True)
        for micro in between_replicas_once(policy, micros):
            policy(micro, replace(part, targets=masked.at(micro.grid))).loss.backward()
        [result] = total_norms([[p.grad for p in policy.parameters() if p.grad is not None]])
        policy.zero_grad(set_to_none=True)
        return result

    row = {}
    for name, part, keep in (
        ("actor/adv_mask_grad_frac", surrogate, targets.advantage_keep),
        ("actor/entropy_filter_grad_frac", entropy, targets.entropy_keep),
    ):
        whole = norm(part, everything)
        row[name] = float(norm(part, everything & ~keep) / torch.where(whole > 0, whole, torch.nan))
    return row
