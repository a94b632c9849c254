"""What a step reads the old log-probs for: those of the policy that sampled, by a pass over the whole batch."""

from __future__ import annotations

from asyppo.config.schema import AsyPPOConfig


def reads_old_logprobs(config: AsyPPOConfig) -> list[str]:
    """Return the settings that read log-prob or entropy of the sampled tokens before the policy's update, or where that
    does not compute them; where there are none, a step can do without the pass that makes them."""
    readers = {
        "use_kl_in_reward": config.use_kl_in_reward,  # log π_old - log π_ref
        "importance_sampling_clip_max": config.importance_sampling_clip_max is not None,  # π_old / π_sampler
        "mask_truncated_completions": config.mask_truncated_completions,  # metrics of responses that no loss reads
    }
    return [name for name, reads in readers.items() if reads]
