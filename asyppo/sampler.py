"""Sampling responses: a small interface, and Hugging Face ``generate`` behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from asyppo.distributed import divided, own_randomness


@dataclass
class Response:
    """One sampled response, on the CPU."""

    tokens: Tensor
    """int64 [length], at least 1; ends with an end-of-sequence token unless ``truncated``."""
    logprob: Tensor
    """float32 [length]: log-prob of each token under the distribution it was drawn from."""
    truncated: bool
    """Cut off by the length limit."""


class Sampler(Protocol):
    """Anything that continues prompts with the current policy."""

    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """Return one response for each prompt (int64 [length])."""
        ...


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
        autocast: torch.autocast | None = None,
    ):
        self.model, self.batch_size = model, batch_size
        self.eos_token_ids, self.pad_token_id = list(eos_token_ids), pad_token_id
        self.autocast = autocast

    @torch.no_grad()
    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """Return one response for each prompt (int64 [length])."""
        # Prompts of like length go together, so that padding is small.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        responses: list[Response | None] = [None] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            drawn = self._generate([prompts[i] for i in chosen], max_completion_length, temperature)
            for index, response in zip(chosen, drawn, strict=True):
                responses[index] = response
        return [response for response in responses if response is not None]

    def _generate(self, prompts: Sequence[Tensor], max_new_tokens: int, temperature: float) -> list[Response]:
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
        with _without_own_generation_config(self.model), _evaluating(self.model), self.autocast or nullcontext():
            output = self.model.generate(
                input_ids=input_ids.to(self.model.device),
                attention_mask=attention_mask.to(self.model.device),
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


class DividedSampler:
    """``Sampler`` of several ranks: each samples its own prompts, whole groups, and gets the responses of all.

    ``weights`` is the context in which the model of ``sampler`` has its weights. Ranks draw different random numbers,
    so samples depend on their number.
    """

    def __init__(self, sampler: Sampler, weights: Callable[[], AbstractContextManager[None]] = nullcontext):
        self.sampler, self.weights = sampler, weights

    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """Return one response for each prompt (int64 [length])."""

        def own(part: slice) -> list[Response]:
            return self.sampler.sample(
                prompts[part], max_completion_length=max_completion_length, temperature=temperature
            )

        with self.weights(), own_randomness():
            return divided(own, [prompt.tolist() for prompt in prompts])


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


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
