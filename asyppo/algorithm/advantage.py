"""Steps 4 and 5 of AsyPPO: from values to advantages, and which tokens count. And what others do instead."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from asyppo.algorithm.masked import masked_mean, masked_moments
from asyppo.algorithm.ops import FUSED, Ops
from asyppo.algorithm.options import AdvantageOptions
from asyppo.algorithm.signal import LearningSignal, Outcome
from asyppo.algorithm.turns import returns_after_turns, reward_without_luck
from asyppo_kernels import ensemble_gae


def critics_advantage(outcome: Outcome, options: AdvantageOptions, ops: Ops = FUSED) -> LearningSignal:
    """AsyPPO's and PPO's: GAE on the mean of M critics, whitened, and the two masks from their disagreement.

    With ``cross_fit`` a response's mean value leaves out the critic that learned from it (as in arXiv 1608.00060); σ is
    over all critics. Only tokens that losses count are whitened and ranked. σ is ranked as ``coarse`` has it.
    (AsyPPO, arXiv 2510.01656; GAE, arXiv 1506.02438.) With ``monte_carlo`` the advantage is that of
    ``monte_carlo_advantage``. Where an environment answers, its tokens are skipped, and with ``environment_credit``
    ``drop`` what its answers brought beyond V is left out. Raises ValueError without critics.
    """
    if outcome.values is None:
        raise ValueError("values: got None, needs the values [M, B, T] of critics")
    if options.advantage_values == "monte_carlo":
        return monte_carlo_advantage(outcome, options, ops)
    values, mask, learned = outcome.values, outcome.mask, outcome.learned
    trained_by = outcome.share if options.advantage_values == "cross_fit" else None
    fitted = values if trained_by is None else without_own_critic(values, trained_by)
    lam: float | Tensor = options.lam
    if options.length_adaptive_alpha is not None:
        lam = length_adaptive_lambda(mask.sum(dim=1), options.length_adaptive_alpha)
    gae = ops.ensemble_gae(fitted, outcome.reward, mask, gamma=options.gamma, lam=lam, value_lam=options.value_lambda)
    std = gae.std if trained_by is None else torch.where(mask, values.std(dim=0, correction=0), 0.0)
    advantage, returns, mean = gae.advantage, gae.returns, gae.mean
    if (turns := outcome.turns) is not None:
        mean = torch.where(mask | turns.after, fitted.mean(dim=0), 0.0)
        returns = returns_after_turns(returns, outcome.reward, turns)
        if options.environment_credit == "drop":
            reward = reward_without_luck(outcome.reward, mean, mask, turns, options.gamma)
            advantage = ops.ensemble_gae(fitted, reward, mask, gamma=options.gamma, lam=lam).advantage
    advantage_keep, entropy_keep, low, high = disagreement_masks(std, learned, options, ops, outcome.seed)
    return LearningSignal(
        advantage=whiten(advantage, learned, outcome.group, options.whiten),
        advantage_keep=advantage_keep,
        entropy_keep=entropy_keep,
        raw_advantage=advantage,
        returns=returns,
        value=mean,
        values=values,
        std=std,
        low=low,
        high=high,
    )


def disagreement_masks(
    std: Tensor, learned: Tensor, options: AdvantageOptions, ops: Ops = FUSED, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return I^A and I^H, bool [B, T], and the thresholds of σ = ``std`` [B, T] that they come from, 0-d.

    k and h of the paper, ``advantage_mask_fraction`` and ``entropy_filter_fraction``, are of the tokens in ``learned``
    (bool [B, T]) of the batch, of each response, or of each position in the responses. Two departures from the paper's
    I^A: ``advantage_mask`` ``random`` drops k of the tokens by numbers that follow from ``seed``, whatever their σ; and
    the first ``advantage_mask_skip`` tokens of a response are kept, k being of the others.
    """
    sigma = coarse(std)
    k = 0.0 if options.advantage_mask == "none" else options.advantage_mask_fraction
    if options.advantage_mask != "random" and options.advantage_mask_skip == 0:
        return _masks_in_scope(sigma, learned, k, options, ops)
    _, entropy_keep, low, high = _masks_in_scope(sigma, learned, 0.0, options, ops)
    ranked = learned & (learned.cumsum(dim=1) > options.advantage_mask_skip)
    if options.advantage_mask == "random":
        generator = torch.Generator().manual_seed(seed)
        sigma = torch.rand(std.shape, generator=generator).to(std.device)
    advantage_keep, _, edge, _ = _masks_in_scope(sigma, ranked, k, options, ops)
    return advantage_keep | (learned & ~ranked), entropy_keep, low if options.advantage_mask == "random" else edge, high


def _masks_in_scope(
    sigma: Tensor, counted: Tensor, advantage_fraction: float, options: AdvantageOptions, ops: Ops
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks and thresholds by the rank of ``sigma`` [B, T] among the tokens in ``counted``; of several scopes, the mean
    of the thresholds of those that have tokens."""
    masks = partial(
        ops.agreement_masks,
        advantage_fraction=advantage_fraction,
        entropy_fraction=options.entropy_filter_fraction,
    )
    if options.quantile_scope == "batch":
        return masks(sigma, counted)
    dim = 0 if options.quantile_scope == "sequence" else 1
    parts = [masks(s, c) for s, c in zip(sigma.unbind(dim), counted.unbind(dim), strict=True)]
    advantage_keep = torch.stack([part.advantage_keep for part in parts], dim)
    entropy_keep = torch.stack([part.entropy_keep for part in parts], dim)
    there = counted.any(dim=1 - dim)
    low = masked_mean(torch.stack([part.low for part in parts]), there)
    high = masked_mean(torch.stack([part.high for part in parts]), there)
    return advantage_keep, entropy_keep, low, high


def monte_carlo_advantage(outcome: Outcome, options: AdvantageOptions, ops: Ops = FUSED) -> LearningSignal:
    """VinePPO's (arXiv 2410.01679): GAE on values that continuations have estimated.

    What is written from one state to the next is one action, whose tokens share its advantage and, in what is reported,
    its state's value; λ counts states. With λ = 0 it is the paper's advantage, its equation 7. If there are critics,
    masks come from their σ; otherwise nothing is masked. Raises ValueError without such values.
    """
    if outcome.monte_carlo is None:
        raise ValueError("monte_carlo: got None, needs values from continuations")
    states, mask, learned = outcome.monte_carlo.states, outcome.mask, outcome.learned
    # Of each token, the number of its action in the response.
    action = (states.cumsum(dim=1) - 1).clamp(min=0)
    reward = torch.zeros_like(outcome.reward).scatter_add(1, action, torch.where(mask, outcome.reward, 0.0))
    actions = torch.arange(mask.shape[1], device=mask.device) < states.sum(dim=1, keepdim=True)

    def to_tokens(grid: Tensor) -> Tensor:
        return torch.where(mask, grid.gather(1, action), 0.0)

    lam: float | Tensor = options.lam
    if options.length_adaptive_alpha is not None:
        lam = length_adaptive_lambda(states.sum(dim=1), options.length_adaptive_alpha)
    there = torch.where(states, outcome.monte_carlo.value, 0.0)
    value = torch.zeros_like(there).scatter_add(1, action, there)
    gae = ops.ensemble_gae(value[None], reward, actions, gamma=options.gamma, lam=lam, value_lam=options.value_lambda)
    advantage = to_tokens(gae.advantage)
    signal = replace(
        unmasked_signal(outcome, whiten(advantage, learned, outcome.group, options.whiten)),
        raw_advantage=advantage,
        returns=to_tokens(gae.returns),
        value=to_tokens(value),
    )
    if outcome.values is None:
        return signal
    std = torch.where(mask, outcome.values.std(dim=0, correction=0), 0.0)
    advantage_keep, entropy_keep, low, high = disagreement_masks(std, learned, options, ops, outcome.seed)
    return replace(
        signal,
        advantage_keep=advantage_keep,
        entropy_keep=entropy_keep,
        values=outcome.values,
        std=std,
        low=low,
        high=high,
    )


def group_advantage(outcome: Outcome, options: AdvantageOptions) -> LearningSignal:
    """GRPO's (arXiv 2402.03300): a response's reward less its group's mean, on each token.

    It is divided by the rewards' standard deviation in the group or in the batch, or, as Dr. GRPO has it
    (arXiv 2503.20783), by nothing: ``scale_rewards``. As in TRL: the sample standard deviation, plus 1e-4. A group of
    one, or of equal rewards, gets 0. Tokens that losses do not count are not kept; their response's reward still counts
    in its group.
    """
    score, count, mean = _of_groups(outcome)
    advantage = score - mean
    if options.scale_rewards == "group":
        variance = _sum_by_group(advantage.square(), outcome.group) / (count - 1).clamp(min=1)
        advantage /= variance.sqrt() + 1e-4
    elif options.scale_rewards == "batch":
        everyone = torch.ones_like(score, dtype=torch.bool)
        size = everyone.sum()
        advantage /= (masked_moments(score, everyone)[1] * size / (size - 1).clamp(min=1)).sqrt() + 1e-4
    return unmasked_signal(outcome, torch.where(outcome.mask, advantage[:, None], 0.0), baseline=mean)


def leave_one_out_advantage(outcome: Outcome, options: AdvantageOptions) -> LearningSignal:
    """RLOO's (arXiv 2402.14740): a response's reward less the mean reward of its group's others, on each token.

    It is not normalised. A group of one gets its reward.
    """
    score, count, mean = _of_groups(outcome)
    others = (count * mean - score) / (count - 1).clamp(min=1)
    return unmasked_signal(outcome, torch.where(outcome.mask, (score - others)[:, None], 0.0), baseline=others)


def reward_to_go_advantage(outcome: Outcome, options: AdvantageOptions) -> LearningSignal:
    """REINFORCE++'s (arXiv 2501.03262): the discounted rewards from a token on, normalised over the batch.

    It has no baseline but the batch's mean, which ``whiten`` takes; penalties in the rewards (``use_kl_in_reward``) are
    counted from their own token on.
    """
    nothing = torch.zeros_like(outcome.reward)[None]
    returns = ensemble_gae(nothing, outcome.reward, outcome.mask, gamma=options.gamma, lam=1.0).advantage
    signal = unmasked_signal(outcome, returns)
    return replace(signal, advantage=whiten(returns, outcome.learned, outcome.group, options.whiten), returns=returns)


def _of_groups(outcome: Outcome) -> tuple[Tensor, Tensor, Tensor]:
    """Of each response, float32 [B]: its score, how many its group has, and their mean score."""
    score = outcome.reward.sum(dim=1)
    count = _sum_by_group(torch.ones_like(score), outcome.group)
    return score, count, _sum_by_group(score, outcome.group) / count


def unmasked_signal(outcome: Outcome, advantage: Tensor, *, baseline: Tensor | None = None) -> LearningSignal:
    """Return the signal of an ``advantage`` float32 [B, T] that was made without critics: nothing is masked.

    ``baseline`` float32 [B] stands where critics have their value; None: 0. It is reported, and changes nothing.
    """
    zero = torch.zeros((), device=advantage.device)
    baseline = torch.zeros_like(advantage[:, 0]) if baseline is None else baseline
    score = outcome.reward.sum(dim=1)
    return LearningSignal(
        advantage=advantage,
        advantage_keep=outcome.learned,
        entropy_keep=outcome.learned,
        raw_advantage=advantage,
        returns=torch.where(outcome.mask, score[:, None], 0.0),
        value=torch.where(outcome.mask, baseline[:, None], 0.0),
        values=advantage.new_zeros(0, *advantage.shape),
        std=torch.zeros_like(advantage),
        low=zero,
        high=zero,
    )


def coarse(std: Tensor) -> Tensor:
    """Round float32 ``std`` >= 0 to 12 bits after the leading one, half a part in 4,096.

    All responses to a prompt have the same first state, so ties in σ are many, and the last bits of a model's outputs
    depend on what else is in the micro-batch. Ranked as they are, those bits would decide which of the tied tokens a
    mask drops.
    """
    return ((std.view(torch.int32) + 0x400) & ~0x7FF).view(torch.float32)


def length_adaptive_lambda(length: Tensor, alpha: float) -> Tensor:
    """Return λ = 1 - 1 / (α l), at least 0, float32 [B], of responses of ``length`` l tokens (int64 [B]).

    The sum of λ's powers is then α l: an advantage looks ahead over a share of the response, whatever its length
    (VAPO, arXiv 2504.05118, equation 9).
    """
    return (1 - 1 / (alpha * length.float())).clamp(min=0)


def without_own_critic(value: Tensor, trained_by: Tensor) -> Tensor:
    """Put the others' mean in place of the value of the critic that was trained on a response, so that the mean over
    critics is the others'. ``value`` [M, B, T] with M >= 2, ``trained_by`` int64 [B]; returns [M, B, T]."""
    own = torch.arange(len(value), device=value.device)[:, None, None] == trained_by[:, None]
    return torch.where(own, torch.where(own, 0.0, value).sum(dim=0) / (len(value) - 1), value)


def whiten(advantage: Tensor, mask: Tensor, group: Tensor, scope: Literal["none", "batch", "group"]) -> Tensor:
    """Give the advantages [B, T] of the response tokens of the batch, or of each prompt, mean 0 and deviation 1."""
    if scope == "none":
        return advantage
    advantage = torch.where(mask, advantage, 0.0)
    if scope == "batch":
        count, total = mask.sum(), advantage.sum()
        count = count.clamp(min=1)
        deviation = torch.where(mask, advantage - total / count, 0.0)
        variance = deviation.square().sum() / count
    else:
        count = _sum_by_group(mask.sum(dim=1).float(), group).clamp(min=1)
        mean = (_sum_by_group(advantage.sum(dim=1), group) / count)[:, None]
        deviation = torch.where(mask, advantage - mean, 0.0)
        variance = (_sum_by_group(deviation.square().sum(dim=1), group) / count)[:, None]
    return deviation * (variance + 1e-8).rsqrt()


def _sum_by_group(value: Tensor, group: Tensor) -> Tensor:
    """Sum of ``value`` [B] over each row's group, at each row."""
    total = torch.zeros(len(group), dtype=value.dtype, device=value.device)
    return total.index_add_(0, group, value)[group]
