"""vLLM as a sampler: in a process of its own on this machine, or on servers that somebody has started.

See ``docs/vllm.md`` for what goes with what. Nothing here imports vLLM but ``worker``, which runs apart.
"""

from __future__ import annotations

from asyppo.rollout.samplers.vllm.sampler import VLLMSampler, make_vllm_sampler

__all__ = ["VLLMSampler", "make_vllm_sampler"]
