"""What is done to the rewards of a sampled batch before anything learns from them."""

from __future__ import annotations

import torch
from torch import Tensor

from asyppo.algorithm.masked import masked_mean
from asyppo.algorithm.options import ShapingOptions


def shape_rewards(
    reward: Tensor, mask: Tensor, old_logprob: Tensor | None, ref_logprob: Tensor | None, options: ShapingOptions
) -> tuple[Tensor, dict[str, float]]:
    """Return ``reward`` [B, T] less the penalties on length and on distance from the reference, as far as ``options``
    ask for them, and their metrics. ``mask`` bool [B, T] is the response tokens; log-probs are float32 [B, T], in
    nats, and read for ``use_kl_in_reward`` alone."""
    reward, metrics = reward.clone(), {}
    if options.overlong_buffer_len:
        limit = options.max_completion_length - options.overlong_buffer_len
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).amax(dim=1)
        length = last + 1  # what an environment has said in between counts, as for the limit
        penalty = options.overlong_penalty_factor * overlong_fraction(length, limit, options.overlong_buffer_len)
        reward[torch.arange(len(reward), device=reward.device), last] -= penalty
        everyone = torch.ones_like(length, dtype=torch.bool)
        metrics["critic/overlong_penalty/mean"] = float(masked_mean(penalty, everyone))
    if options.use_kl_in_reward:
        assert old_logprob is not None
        assert ref_logprob is not None
        kl = old_logprob - ref_logprob
        reward -= torch.where(mask, options.beta * kl, 0.0)
        metrics["actor/reward_kl_penalty"] = float(masked_mean(kl, mask))
        metrics["actor/reward_kl_penalty_coeff"] = options.beta
    return reward, metrics


def overlong_fraction(length: Tensor, limit: int, buffer_len: int) -> Tensor:
    """Return float32 [B]: 0 up to ``limit`` tokens, from there rising linearly to 1 at ``limit + buffer_len``.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), positive; ``length`` int64 [B].
    """
    return ((length - limit) / buffer_len).clamp(0, 1)
