"""What a sampler is, and what samplers have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyppo.distributed.processes import agreed, divided, own_part, own_randomness
from asyppo.distributed.sharding import WholeCopy
from asyppo.models.adapters import has_adapters

NamedWeights = Iterable[tuple[str, Tensor]]
"""Weights by the names that the model's ``state_dict`` has for them, whole, one after another; tied ones each."""


@dataclass
class Response:
    """One sampled response, on the CPU."""

    tokens: Tensor
    """int64 [length], at least 1; ends with an end-of-sequence token unless ``truncated``."""
    logprob: Tensor
    """float32 [length]: log-prob of each token under the distribution it was drawn from."""
    truncated: bool
    """Cut off by the length limit."""


def cut_at_the_end(tokens: Tensor, logprob: Tensor, eos_token_ids: Sequence[int]) -> list[Response]:
    """Return rows of ``tokens`` (int64 [n, T], on the CPU) and their log-probs up to and including the first
    end-of-sequence token; what follows it is padding."""
    is_end = torch.isin(tokens, torch.tensor(eos_token_ids, dtype=torch.int64))
    finished = is_end.any(dim=1)
    length = torch.where(finished, is_end.int().argmax(dim=1) + 1, tokens.shape[1])
    return [
        Response(tokens[row, :n].clone(), logprob[row, :n].clone(), not done)
        for row, (n, done) in enumerate(zip(length.tolist(), finished.tolist(), strict=True))
    ]


class EngineError(RuntimeError):
    """A sampler's engine has failed, died or not answered. The message names it and says what it printed last."""

    exit_status = 1


class Sampler(Protocol):
    """Anything that continues prompts with the current policy.

    One that has a copy of the weights, in an engine of its own, also has ``update_weights``: see ``HoldsWeights``.
    """

    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """Return one response for each prompt (int64 [length]). At temperature 0 it is made of the likeliest tokens,
        the first of equals, whose log-probs are 0: nothing else could be drawn."""
        ...


@runtime_checkable
class HoldsWeights(Protocol):
    """A sampler whose engine has a copy of the policy's weights."""

    def update_weights(self, weights: NamedWeights) -> None:
        """Take the policy's weights; called before the first sampling and after each update. They come in pieces, each
        of which is only good until the next: copy what is to stay."""
        ...


@runtime_checkable
class SamplesAhead(Protocol):
    """A sampler that samples while the caller does something else."""

    def begin(
        self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float
    ) -> Callable[[], list[Response]]:
        """Begin what ``sample`` does, with the weights and the random numbers of now, and return what waits for its
        end. Other methods may be called before that."""
        ...


@runtime_checkable
class Sleeps(Protocol):
    """A sampler whose engine can give memory back while it is not needed."""

    def sleep(self) -> bool:
        """Give memory back until the next call; return whether the weights are gone with it."""
        ...


class SentWeights:
    """``Sampler`` that sends ``weights()`` to ``engine`` before ``sampler`` samples, where they have changed."""

    def __init__(self, sampler: Sampler, engine: HoldsWeights, weights: Callable[[], NamedWeights]):
        self.sampler, self.engine, self.weights = sampler, engine, weights
        self.stale = True
        self.changes = 0
        """How often the weights have changed."""

    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """Return one response for each prompt (int64 [length])."""
        self.send()
        try:
            return self.sampler.sample(prompts, max_completion_length=max_completion_length, temperature=temperature)
        except EngineError:
            self.stale = True  # where it is called again, its engine begins anew
            raise

    def begin(
        self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float
    ) -> Callable[[], list[Response]]:
        """As ``SamplesAhead.begin``."""
        self.send()
        assert isinstance(self.sampler, SamplesAhead)
        finish = self.sampler.begin(prompts, max_completion_length=max_completion_length, temperature=temperature)

        def responses() -> list[Response]:
            try:
                return finish()
            except EngineError:
                self.stale = True
                raise

        return responses

    def changed(self) -> None:
        """Take note that the weights are others now."""
        self.stale = True
        self.changes += 1

    def send(self) -> None:
        """Send the weights, where the engine has others."""
        if self.stale:
            self.engine.update_weights(self.weights())
            self.stale = False

    def rest(self) -> None:
        """Let the engine give memory back, where it can, until it is called again."""
        if isinstance(self.engine, Sleeps):
            self.stale |= self.engine.sleep()


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

    def begin(
        self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float
    ) -> Callable[[], list[Response]]:
        """As ``SamplesAhead.begin``."""
        keys, sampler = [prompt.tolist() for prompt in prompts], self.sampler
        part = own_part(keys)

        def begin() -> Callable[[], list[Response]]:
            assert isinstance(sampler, SamplesAhead)
            if part.start == part.stop:
                return list
            return sampler.begin(prompts[part], max_completion_length=max_completion_length, temperature=temperature)

        with own_randomness():
            finish = agreed(begin)
        return lambda: divided(lambda part: finish(), keys)


class WorkingWeights:
    """The weights that a sampler decodes with: the model's own where they have ``dtype``, or else a copy in ``dtype``.

    Decoding reads every weight for every token, so it is done in bfloat16 weights rather than in float32 masters that
    autocast would cast again and again. The copy takes 2 bytes a parameter beside the masters' 4, while it is used. A
    model with adapters has no copy: what is large in it is frozen, and in ``dtype`` anyway.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype):
        self.model, self.copy = model, None
        if not has_adapters(model) and any(p.dtype != dtype for p in model.parameters()):
            self.copy = WholeCopy(model, dtype, model.device)

    @contextmanager
    def current(self) -> Iterator[PreTrainedModel]:
        """Give, for the time inside, a model with the weights as they are now."""
        if self.copy is None:
            yield self.model
            return
        with self.copy.of(self.model):
            yield self.copy.module


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put ``model`` in eval mode for the time inside."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@dataclass(eq=False, repr=False)
class ModelSampler:
    """What the samplers have that decode with a model of this process."""

    model: PreTrainedModel
    _: KW_ONLY
    eos_token_ids: list[int]
    pad_token_id: int
    batch_size: int = 512
    """Most responses under way."""
    dtype: torch.dtype = torch.float32
    """Of the weights that it decodes with."""

    def __post_init__(self) -> None:
        self.weights = WorkingWeights(self.model, self.dtype)
