"""Hugging Face ``generate``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from asyppo.rollout.samplers.base import Response, WorkingWeights, evaluating


class GenerateSampler:
    """``Sampler`` over Hugging Face ``generate``, batched with left padding; the whole softmax is sampled from.

    Randomness comes from torch's global generator. Sampling settings that a checkpoint brings along (top-k, top-p,
    repetition penalty, …) do not apply: with them, log-probs of the trainer would be those of another distribution.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        batch_size: int = 512,
        dtype: torch.dtype = torch.float32,
    ):
        self.weights, self.batch_size = WorkingWeights(model, dtype), batch_size
        self.eos_token_ids, self.pad_token_id = list(eos_token_ids), pad_token_id

    @torch.no_grad()
    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """Return one response for each prompt (int64 [length])."""
        model = self.weights.current()
        # Prompts of like length go together, so that padding is small.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        responses: list[Response | None] = [None] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
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
            use_cache=True,
        )
        with _without_own_generation_config(model), evaluating(model):
            output = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([recorder]),
            )
        tokens = output[:, width:].cpu()
        logprob = recorder.finish(output).cpu()
        is_eos = torch.isin(tokens, torch.tensor(self.eos_token_ids))
        # Length up to and including the first end-of-sequence token; what follows it is padding.
        finished = is_eos.any(dim=1)
        length = torch.where(finished, is_eos.int().argmax(dim=1) + 1, tokens.shape[1])
        return [
            Response(tokens[row, :n].clone(), logprob[row, :n].clone(), not done)
            for row, (n, done) in enumerate(zip(length.tolist(), finished.tolist(), strict=True))
        ]


class _TemperLogitsAndRecord(LogitsProcessor):
    """Divide logits by the temperature, and keep the log-prob of the token that is drawn from them.

    The token is known one call later, so one [B, V] tensor waits for it; nothing of size [B, T, V] exists.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.waiting: Tensor | None = None
        self.recorded: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids)
        scores = scores.float() / self.temperature
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
