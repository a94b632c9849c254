"""transformers' continuous batching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from asyppo.distributed.processes import forked_rng
from asyppo.rollout.samplers.base import ModelSampler, Response, evaluating


class ContinuousBatchingSampler(ModelSampler):
    """``Sampler`` over transformers' continuous batching: a response that ends makes room for the next at once, and
    the responses of one prompt share its key-value cache, which is paged.

    On a GPU the cache takes what memory is free, and gives it back; the
    attention is the model's, and flash attention is the one worth having here. Randomness comes from torch's global
    generator, the whole softmax is sampled from, and a checkpoint's own sampling settings do not apply.
    """

    @torch.no_grad()
    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """Return one response for each prompt (int64 [length]). Raises RuntimeError where transformers cannot."""
        if not prompts:
            return []
        with self.weights.current() as model:
            return self._sample(model, prompts, max_completion_length, temperature)

    def _sample(
        self, model: PreTrainedModel, prompts: Sequence[Tensor], max_completion_length: int, temperature: float
    ) -> list[Response]:
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # the cache takes what is free, and what training keeps for reuse is not
        generation = GenerationConfig(
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_completion_length,
            eos_token_id=self.eos_token_ids or -1,
            pad_token_id=self.pad_token_id,
        )
        batching = self._batching(model, max(len(p) for p in prompts) + max_completion_length, len(prompts))
        # The manager seeds the global generator.
        with evaluating(model), _own_attention(model), forked_rng():
            manager = model.init_continuous_batching(generation, batching)
            try:
                # Before it starts, so that what is drawn does not depend on how fast the requests come in.
                names = manager.add_requests([p.tolist() for p in prompts], max_new_tokens=max_completion_length)
                manager.start()
                finished: dict[str, GenerationOutput] = {}
                while len(finished) < len(prompts):
                    result = manager.get_result(timeout=1)
                    if result is not None:
                        finished[result.request_id] = result
                    elif not manager.is_running():
                        break
            finally:
                manager.stop(block=True)
                manager.destroy()
        errors = {str(result.error) for result in finished.values() if result.error is not None}
        whole = sum(result.error is None for result in finished.values())
        if whole < len(prompts):
            raise RuntimeError(
                f"continuous batching: {whole} of {len(prompts)} responses finished; "
                f"{'; '.join(sorted(errors)) or 'its thread ended'}. sampler: generate does without it"
            )
        return [self._response(finished[name], certain=temperature == 0) for name in names]

    def _batching(self, model: PreTrainedModel, longest: int, count: int) -> ContinuousBatchingConfig:
        together, page = min(self.batch_size, count), 32 if model.device.type == "cpu" else 256
        blocks = -(-longest // page)
        settings: dict[str, Any] = {
            "max_requests_per_batch": together,
            "return_logprobs": True,
            "seed": int(torch.randint(2**62, ())),
        }
        known = {field.name for field in fields(ContinuousBatchingConfig)}
        settings["page_size" if "page_size" in known else "block_size"] = page  # transformers 5.17 has the latter
        if "auto_switch_to_flash" in known:  # from 5.19 on
            settings["auto_switch_to_flash"] = False
        if model.device.type == "cpu":
            # Room for as many at once, and no more: by default it is made for most of the memory, and masks with it.
            settings |= {
                "num_blocks": together * blocks,
                "max_batch_tokens": max(256, together),
                "allow_block_sharing": False,
            }
        elif "flash" in str(model.config._attn_implementation):
            settings["max_blocks_per_request"] = 2 * (blocks // 2 + 1)  # even, and one to spare
        return ContinuousBatchingConfig(**settings)

    def _response(self, output: GenerationOutput, certain: bool) -> Response:
        tokens, logprob = torch.tensor(output.generated_tokens), torch.tensor(output.logprobs)
        ended = output.generated_tokens[-1] in self.eos_token_ids
        return Response(tokens, torch.zeros_like(logprob) if certain else logprob, not ended)


@contextmanager
def _own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Put the attention of ``model`` back afterwards; a manager that fails leaves its own behind."""
    own = model.config._attn_implementation
    try:
        yield
    finally:
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)
