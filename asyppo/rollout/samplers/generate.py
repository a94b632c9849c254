"""Hugging Face ``generate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from asyppo.rollout.samplers.base import ModelSampler, Response, cut_at_the_end, evaluating
from asyppo.rollout.samplers.draw import tempered


@dataclass(eq=False, repr=False, kw_only=True)
class GenerateSampler(ModelSampler):
    """``Sampler`` over Hugging Face ``generate``, batched with left padding; the whole softmax is sampled from. Without
    ``pads`` a batch has prompts of one length, for models that read padding, too; without ``cache`` each token is drawn
    from a pass over all tokens before it.

    Randomness comes from torch's global generator. Sampling settings that a checkpoint brings along (top-k, top-p,
    repetition penalty, …) do not apply: with them, log-probs of the trainer would be those of another distribution.
    """

    pads: bool = True
    cache: bool = True

    @torch.no_grad()
    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """Return one response for each prompt (int64 [length])."""
        # Prompts of like length go together, so that padding is small.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        responses: list[Response | None] = [None] * len(prompts)
        start = 0
        with self.weights.current() as model:
            while start < len(order):
                width = len(prompts[order[start]])
                batch = order[start : start + self.batch_size]
                chosen = [i for i in batch if self.pads or len(prompts[i]) == width]
                start += len(chosen)
                drawn = self._generate(model, [prompts[i] for i in chosen], max_completion_length, temperature)
                for index, response in zip(chosen, drawn, strict=True):
                    responses[index] = response
        return [response for response in responses if response is not None]

    def _generate(
        self, model: PreTrainedModel, prompts: Sequence[Tensor], max_new_tokens: int, temperature: float
    ) -> list[Response]:
        width = max(len(p) for p in prompts)
        input_ids = torch.full((len(prompts), width), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = prompt
            attention_mask[row, width - len(prompt) :] = 1
        recorder = _TemperLogitsAndRecord(temperature)
        config = GenerationConfig(
            do_sample=True,
            temperature=1.0,  # the recorder divides by the temperature
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            use_cache=self.cache,
        )
        with _without_own_generation_config(model), evaluating(model):
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([recorder]),
            )
        return cut_at_the_end(output[:, width:].cpu(), recorder.finish(output).cpu(), self.eos_token_ids)


class _TemperLogitsAndRecord(LogitsProcessor):
    """Divide logits by the temperature, or at 0 leave the likeliest token alone, and keep the log-prob of the token
    that is drawn from them.

    The token is known one call later, so one [B, V] tensor waits for it; nothing of size [B, T, V] exists.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.waiting: Tensor | None = None
        self.recorded: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids)
        scores = tempered(scores, self.temperature)
        self.waiting = scores.log_softmax(dim=-1)
        return scores

    def _record(self, input_ids: Tensor) -> None:
        if self.waiting is not None:
            self.recorded.append(self.waiting.gather(1, input_ids[:, -1:]))

    def finish(self, output: Tensor) -> Tensor:
        """Return float32 [B, new tokens], given the finished sequences."""
        self._record(output)
        return torch.cat(self.recorded, dim=1)


@contextmanager
def _without_own_generation_config(model: PreTrainedModel) -> Iterator[None]:
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
