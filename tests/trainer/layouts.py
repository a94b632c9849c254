"""What tests of the layouts of a policy's pass share: padded, packed, with shared prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asyppo.data.batch import Batch, micro_batches
from asyppo.models.policy import Policy

SHAPE: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}


def results(policy: Policy, batch: Batch, budget: int = 40, **layout: bool) -> list[Tensor]:
    """Log-probs and entropies [B, T], and the gradient of a function of both; ``layout`` goes to ``micro_batches``."""
    micros = list(micro_batches(batch, torch.randperm(len(batch)), budget, **layout))
    assert len(micros) > 1
    stats = policy.logprobs(batch, micros)
    policy.zero_grad()
    for micro in micros:
        found = policy(micro)
        assert found.entropy is not None
        (found.logprob.sum() + 0.3 * found.entropy.square().sum()).backward()
    return [*stats, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])]
