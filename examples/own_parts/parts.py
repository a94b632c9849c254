"""A policy loss, an advantage and a sampler of one's own, each by ``path.py:name`` in config.yaml."""

from __future__ import annotations

import copy

import torch

from asyppo.algorithm.advantage import unmasked_signal
from asyppo.algorithm.options import AdvantageOptions
from asyppo.algorithm.policy_losses import PolicyTokens, Surrogate
from asyppo.algorithm.signal import LearningSignal, Outcome
from asyppo.rollout.samplers import GenerateSampler


def vanilla(tokens: PolicyTokens) -> Surrogate:
    """A log π, without a ratio and without a clip (REINFORCE)."""
    value = tokens.importance_weight * tokens.advantage * tokens.logprob
    return Surrogate(value, clipped=torch.zeros_like(tokens.keep))


def above_the_batch(outcome: Outcome, options: AdvantageOptions) -> LearningSignal:
    """A response's reward less the batch's mean, on each of its tokens."""
    score = outcome.reward.sum(dim=1)
    advantage = torch.where(outcome.mask, (score - score.mean())[:, None], 0.0)
    return unmasked_signal(outcome, advantage)


class CopySampler(GenerateSampler):
    """``generate`` on a copy of the weights, as an engine of its own would have one."""

    def __init__(self, policy, tokenizer, config):
        ends = {"eos_token_ids": [tokenizer.eos_token_id], "pad_token_id": tokenizer.pad_token_id}
        self.model = copy.deepcopy(policy.model)
        super().__init__(self.model, **ends)

    def update_weights(self, weights):
        """Called before the first sampling and after each update of the policy."""
        self.model.load_state_dict(dict(weights))
