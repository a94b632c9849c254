"""Sampling responses: a small interface, and Hugging Face ``generate`` and continuous batching behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import GenerationOutput

from asyppo.distributed.processes import divided, own_randomness
from asyppo.models.adapters import has_adapters


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


class WorkingWeights:
    """The weights that a sampler decodes with: the model's own where they have ``dtype``, or else a copy in ``dtype``.

    Decoding reads every weight for every token, so it is done in bfloat16 weights rather than in float32 masters that
    autocast would cast again and again. The copy takes 2 bytes a parameter beside the masters' 4. A model with
    adapters has no copy: what is large in it is frozen, and in ``dtype`` anyway.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        self.model, self.copy = model, None
        if not has_adapters(model) and any(p.dtype != dtype for p in model.parameters()):
            # Parameters are replaced while the model is copied, so that no second float32 copy exists on the way.
            cast = {id(p): nn.Parameter(p.detach().to(dtype), requires_grad=False) for p in model.parameters()}
            self.copy = copy.deepcopy(model, cast)

    @torch.no_grad()
    def current(self) -> PreTrainedModel:
        """Return a model with the weights as they are now; a copy is updated in place."""
        if self.copy is None:
            return self.model
        for target, source in zip(self.copy.parameters(), self.model.parameters(), strict=True):
            target.copy_(source)
        return self.copy


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
        with _without_own_generation_config(model), _evaluating(model):
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


class ContinuousBatchingSampler:
    """``Sampler`` over transformers' continuous batching: a response that ends makes room for the next at once, and
    the responses of one prompt share its key-value cache, which is paged.

    ``batch_size`` bounds the responses under way. On a GPU the cache takes what memory is free, and gives it back; the
    attention is the model's, and flash attention is the one worth having here. Randomness comes from torch's global
    generator, the whole softmax is sampled from, and a checkpoint's own sampling settings do not apply.
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
        """Return one response for each prompt (int64 [length]). Raises RuntimeError where transformers cannot."""
        if not prompts:
            return []
        model = self.weights.current()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # the cache takes what is free, and what training keeps for reuse is not
        generation = GenerationConfig(
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_completion_length,
            eos_token_id=self.eos_token_ids or -1,
            pad_token_id=self.pad_token_id,
        )
        batching = self._batching(model, max(len(p) for p in prompts) + max_completion_length, len(prompts))
        with _evaluating(model), torch.random.fork_rng():  # the manager seeds the global generator
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
        if errors or len(finished) < len(prompts):
            raise RuntimeError(
                f"continuous batching: {len(finished)} of {len(prompts)} responses finished; "
                f"{'; '.join(sorted(errors)) or 'its thread ended'}. sampler: generate does without it"
            )
        return [self._response(finished[name].generated_tokens, finished[name].logprobs) for name in names]

    def _batching(self, model: PreTrainedModel, longest: int, count: int) -> ContinuousBatchingConfig:
        together, page = min(self.batch_size, count), 32 if model.device.type == "cpu" else 256
        blocks = -(-longest // page)
        settings: dict[str, Any] = {
            "max_requests_per_batch": together,
            "page_size": page,
            "return_logprobs": True,
            "seed": int(torch.randint(2**62, ())),
            "auto_switch_to_flash": False,
        }
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

    def _response(self, tokens: list[int], logprob: list[float]) -> Response:
        return Response(torch.tensor(tokens), torch.tensor(logprob), tokens[-1] not in self.eos_token_ids)


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
