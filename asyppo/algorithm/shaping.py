"""What is done to the rewards of a sampled batch before anything learns from them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from asyppo.algorithm.masked import masked_mean
from asyppo.config import AsyPPOConfig
from asyppo.data.batch import Batch


def shape_rewards(
    batch: Batch, old_logprob: Tensor, ref_logprob: Tensor | None, config: AsyPPOConfig
) -> tuple[Batch, dict[str, float]]:
    """Return ``batch`` with the penalties on length and on distance from the reference in its ``reward``, and with
    truncated responses ``ignored``, as far as ``config`` asks for them; and their metrics. Log-probs are float32
    [B, T], in nats."""
    reward, row = batch.reward.clone(), {}
    if config.overlong_buffer_len:
        limit = config.max_completion_length - config.overlong_buffer_len
        penalty = config.overlong_penalty_factor * overlong_fraction(
            batch.response_length, limit, config.overlong_buffer_len
        )
        rows = torch.arange(len(batch), device=reward.device)
        reward[rows, batch.response_length - 1] -= penalty
        row["critic/overlong_penalty/mean"] = float(masked_mean(penalty, torch.ones_like(batch.truncated)))
    if config.use_kl_in_reward:
        assert ref_logprob is not None
        kl = old_logprob - ref_logprob
        reward -= torch.where(batch.mask, config.beta * kl, 0.0)
        row["actor/reward_kl_penalty"] = float(masked_mean(kl, batch.mask))
        row["actor/reward_kl_penalty_coeff"] = config.beta
    ignored = batch.truncated if config.mask_truncated_completions else batch.ignored
    return replace(batch, reward=reward, ignored=ignored), row


def overlong_fraction(length: Tensor, limit: int, buffer_len: int) -> Tensor:
    """Return float32 [B]: 0 up to ``limit`` tokens, from there rising linearly to 1 at ``limit + buffer_len``.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), positive; ``length`` int64 [B].
    """
    return ((length - limit) / buffer_len).clamp(0, 1)
