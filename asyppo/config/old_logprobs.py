"""Where a step has the old log-probs from, those of the policy that sampled, and what reads them."""

from __future__ import annotations

from typing import Literal

from asyppo.config.schema import AsyPPOConfig


def reads_old_logprobs(config: AsyPPOConfig) -> list[str]:
    """Return the settings that read log-prob or entropy of the sampled tokens before the policy's update, or where that
    does not compute them; where there are none, a step can do without the pass that makes them."""
    readers = {
        "use_kl_in_reward": config.use_kl_in_reward,  # log π_old - log π_ref
        "importance_sampling_clip_max": config.rollout_weight_max is not None,  # π_old / π_sampler
        "critic.policy_inputs": config.num_critics > 0 and bool(config.critic.policy_inputs),  # what critics read
        "critic.kind": config.num_critics > 0 and config.critic.kind == "side",  # the hidden states of that pass
        "mask_truncated_completions": config.mask_truncated_completions,  # metrics of responses that no loss reads
    }
    return [name for name, reads in readers.items() if reads]


def source_of_old_logprobs(
    config: AsyPPOConfig, *, updates: bool, sampler_agrees: bool
) -> Literal["policy", "update", "sampler"]:
    """Return where a step that ``updates`` the policy, or does not, has its old log-probs from.

    ``policy``: a pass over the whole batch. ``update``: that of the step's only optimizer step. ``sampler``: the
    log-probs that it drew by, if ``sampler_agrees`` with the policy.
    """
    if config.old_per_token_logps == "compute" or not updates or reads_old_logprobs(config):
        return "policy"
    if config.num_iterations * config.num_mini_batches == 1:
        return "update"
    return "sampler" if sampler_agrees else "policy"
