"""The sampler: what the trainer asks for, in vLLM's words."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.distributed.processes import agreed, from_main, local_rank, rank, world_size
from asyppo.models.policy import Policy
from asyppo.models.tokenizer import eos_token_ids
from asyppo.rollout.samplers.base import EngineError, NamedWeights, Response
from asyppo.rollout.samplers.draw import NOT_FINITE
from asyppo.rollout.samplers.vllm.process import EngineProcess
from asyppo.rollout.samplers.vllm.server import Servers
from asyppo.rollout.samplers.vllm.transfer import NCCLTransfer
from asyppo.rollout.samplers.vllm.weights import WeightDirectory, changing, path_of, together
from asyppo.rollout.samplers.vllm.worker import Drawn

LEAST_TEMPERATURE = 0.01
"""vLLM raises whatever is between 0 and this to this."""


class Engine(Protocol):
    """Where vLLM runs. Each method raises EngineError."""

    def load(self, directory: Path) -> None:
        """Take the weights that lie in ``directory``, and forget what was computed with those before."""
        ...

    def begin(self, prompts: list[list[int]], samplings: list[dict[str, Any]]) -> None:
        """Let it draw responses to each of ``prompts`` by the SamplingParams beside it; ``finish`` waits for them."""
        ...

    def finish(self) -> Drawn:
        """Return what ``begin`` asked for."""
        ...

    def sleep(self, level: int) -> None:
        """Give memory back: of the cache, and of the weights, which stay on the host (1) or are gone (2)."""
        ...

    def wake(self, tags: list[str]) -> None:
        """Take the memory of ``weights`` or ``kv_cache`` back."""
        ...


class Channel(Protocol):
    """The way that weights take to the engine. Each method raises EngineError."""

    def write(self, weights: Iterator[tuple[str, Tensor]], wanted: Callable[[str], bool]) -> None:
        """Send those of ``weights`` that are ``wanted`` by name; each is only good until the next."""
        ...

    def load(self, load: Callable[[Path], None]) -> None:
        """Let an engine's ``load`` take them, if it has not yet."""
        ...

    def clear(self) -> None:
        """Give the memory back that they take on the way."""
        ...


class VLLMSampler:
    """``Sampler`` on vLLM, which gets token ids and returns them, with their log-probs under the tempered distribution.

    Neighbouring prompts that are equal are one request. Seeds come from torch's global generator, one a request, so
    that a batch that is drawn again is the same; on a GPU up to what the order of sums does. ``update_weights`` sends
    all weights the first time, and what training changes from then on.
    """

    def __init__(
        self,
        engine: Engine,
        channel: Channel,
        *,
        eos_token_ids: Sequence[int],
        changing: frozenset[str],
        writes: bool = True,
        loads: bool = True,
        sleep_level: int = 0,
        seeded: bool = True,
    ):
        """Of several ranks one a machine (one in all, with servers) ``writes`` weights into the ``channel``, and one an
        engine lets that load them. ``changing``: see ``weights.changing``."""
        self.engine, self.channel, self.eos_token_ids = engine, channel, list(eos_token_ids)
        self.changing, self.writes, self.loads = changing, writes, loads
        self.sleep_level, self.seeded = sleep_level, seeded
        self.loaded = False
        self.asleep: set[str] = set()
        self.under_way: Drawing | None = None

    def update_weights(self, weights: NamedWeights) -> None:
        """Take the policy's weights, whole, one after another, by the names of a model without adapters. Raises
        EngineError."""
        with self._or_begin_anew():
            self._update(weights)
        self.loaded = True

    def _update(self, weights: NamedWeights) -> None:
        agreed(self._settle)
        stream, everything = iter(weights), not self.loaded

        def write() -> None:
            try:
                if self.writes:
                    self.channel.write(stream, lambda name: everything or together(name) in self.changing)
            finally:
                for _ in stream:  # all ranks gather them
                    pass

        def load() -> None:
            if self.loads:
                self._wake("weights")
                self.channel.load(self.engine.load)

        agreed(write)
        agreed(load)
        if self.writes:
            self.channel.clear()

    def sample(self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float) -> list[Response]:
        """Return one response for each prompt (int64 [length]). Raises EngineError."""
        return self.begin(prompts, max_completion_length=max_completion_length, temperature=temperature)()

    def begin(
        self, prompts: Sequence[Tensor], *, max_completion_length: int, temperature: float
    ) -> Callable[[], list[Response]]:
        """Let vLLM draw one response for each prompt (int64 [length]), and return what waits for them. Raises
        EngineError."""
        if 0 < temperature < LEAST_TEMPERATURE:
            raise ConfigError(
                f"temperature: got {temperature:g}, needs at least {LEAST_TEMPERATURE:g} or 0 with sampler vllm, which "
                "takes less for that"
            )
        with self._or_begin_anew():
            self._settle()
            self._wake("weights", "kv_cache")
        groups = [(key, len(list(same))) for key, same in groupby(prompt.tolist() for prompt in prompts)]
        sampling = {
            "temperature": temperature,
            "max_tokens": max_completion_length,
            "stop_token_ids": self.eos_token_ids,
            "ignore_eos": True,  # what ends a response is what the trainer takes for its end
            "logprobs": 0,  # of the token alone
        }
        seeds = torch.randint(2**62, (len(groups),)).tolist()
        certain = temperature == 0  # all are the same, and vLLM refuses to draw several
        own = [
            {"n": 1 if certain else count} | ({"seed": seed} if self.seeded else {})
            for (_, count), seed in zip(groups, seeds, strict=True)
        ]
        drawing = Drawing(self, [count for _, count in groups] if certain else None)
        with self._or_begin_anew():
            self.engine.begin([key for key, _ in groups], [sampling | one for one in own])
        self.under_way = drawing
        return drawing.responses

    def sleep(self) -> bool:
        """Give memory back until the next call, as far as settings say; return whether the weights are gone."""
        if self.sleep_level == 0 or not self.loaded:
            return False
        with self._or_begin_anew():
            agreed(self._settle)
            agreed(lambda: self.engine.sleep(self.sleep_level))
        self.asleep = {"weights", "kv_cache"}
        self.loaded = self.sleep_level == 1
        return not self.loaded

    @contextmanager
    def _or_begin_anew(self) -> Iterator[None]:
        """Let what comes after an error inside be as at the beginning: an engine that has failed knows nothing."""
        try:
            yield
        except EngineError:
            self.loaded, self.under_way = False, None
            self.asleep.clear()
            raise

    def _wake(self, *tags: str) -> None:
        asleep = [tag for tag in tags if tag in self.asleep]
        if asleep:
            self.engine.wake(asleep)
            self.asleep -= set(asleep)

    def _settle(self) -> None:
        """Let what is under way come to its end: vLLM does one thing after another."""
        if self.under_way is not None:
            self.under_way.finish()
            self.under_way = None

    def response(self, tokens: list[int], logprobs: list[float], certain: bool) -> Response:
        """Return what vLLM has drawn as a response; ``certain``: at temperature 0. Raises EngineError where log-probs
        are not finite."""
        logprob = torch.tensor(logprobs)
        if not bool(logprob.isfinite().all()):
            raise EngineError(f"vLLM drew tokens whose log-probs are not finite, {logprobs[:4]} …: {NOT_FINITE}")
        ended = tokens[-1] in self.eos_token_ids
        return Response(torch.tensor(tokens), torch.zeros_like(logprob) if certain else logprob, not ended)


class Drawing:
    """Responses that are being drawn."""

    def __init__(self, sampler: VLLMSampler, copies: list[int] | None):
        """``copies``: at temperature 0, how many responses each prompt gets, all of which are one."""
        self.sampler, self.copies = sampler, copies
        self.drawn: Drawn | None = None

    def finish(self) -> None:
        """Wait for them."""
        if self.drawn is None:
            with self.sampler._or_begin_anew():
                self.drawn = self.sampler.engine.finish()

    def responses(self) -> list[Response]:
        """Return them."""
        self.finish()
        if self.sampler.under_way is self:
            self.sampler.under_way = None
        assert self.drawn is not None
        certain = self.copies is not None
        return [
            self.sampler.response(tokens, logprobs, certain)
            for of_prompt, copies in zip(self.drawn, self.copies or [1] * len(self.drawn), strict=True)
            for tokens, logprobs in of_prompt * copies
        ]


def make_vllm_sampler(policy: Policy, tokenizer: PreTrainedTokenizerBase, config: AsyPPOConfig) -> VLLMSampler:
    """Return the sampler that ``config.vllm`` describes; nothing is started before it gets weights. Of several ranks
    each has a process of its own, with its own GPU, or all share the servers. Raises ConfigError."""
    settings, on_cpu = config.vllm, policy.device.type == "cpu"
    if settings.sleep_level and (settings.url or on_cpu):
        why = "servers, which have GPUs of their own" if settings.url else "a CPU, where vLLM does not sleep"
        raise ConfigError(f"vllm.sleep_level: got {settings.sleep_level}, needs 0 with {why}")
    if settings.weight_transfer == "nccl" and (not settings.url or on_cpu):
        why = "a policy on a GPU" if on_cpu else "vllm.url, servers with GPUs of their own"
        raise ConfigError(f"vllm.weight_transfer: got nccl, needs {why}; directory works everywhere")
    if settings.tensor_parallel_size > 1 and world_size() > 1 and not settings.url:
        raise ConfigError(
            f"vllm.tensor_parallel_size: got {settings.tensor_parallel_size}, needs 1 with several processes, each of "
            "which has an engine on its own GPU; a server (vllm.url) may have more"
        )
    model = policy.model
    name = from_main(lambda: secrets.token_hex(4))
    engine: Engine
    if settings.url:
        engine = Servers(settings.url, start_timeout=settings.start_timeout, timeout=settings.timeout)
    else:
        engine = EngineProcess(
            _arguments(config, str(policy.dtype).removeprefix("torch."), on_cpu),
            python=settings.python,
            environment=_environment(on_cpu),
            start_timeout=settings.start_timeout,
            timeout=settings.timeout,
        )
    shared = bool(settings.url)
    channel: Channel
    if isinstance(engine, Servers) and settings.weight_transfer == "nccl":
        channel = NCCLTransfer(engine, policy.device, policy.dtype, settings.weight_transfer_address)
    else:
        channel = WeightDirectory(path_of(name, settings.weights_dir), model.config, type(model).__name__, policy.dtype)
    return VLLMSampler(
        engine,
        channel,
        eos_token_ids=eos_token_ids(model, tokenizer),
        changing=changing(model),
        writes=(rank() if shared else local_rank()) == 0,
        loads=not shared or rank() == 0,
        sleep_level=settings.sleep_level,
        seeded=settings.seeded,
    )


def _arguments(config: AsyPPOConfig, dtype: str, on_cpu: bool) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM``."""
    settings, length = config.vllm, config.vllm.max_model_len
    if length is None and config.data.max_prompt_length is not None:
        length = config.data.max_prompt_length + config.max_completion_length
    return {
        "skip_tokenizer_init": True,
        "load_format": "safetensors",
        "generation_config": "vllm",  # no top-k, top-p or penalty that a checkpoint brings along
        "logprobs_mode": "processed_logprobs",  # those of the tempered distribution
        "enable_prefix_caching": True,
        "dtype": dtype,
        "seed": config.seed,
        "trust_remote_code": config.policy.trust_remote_code,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enforce_eager": on_cpu if settings.enforce_eager is None else settings.enforce_eager,
        **({"max_model_len": length} if length is not None else {}),
        **({"enable_sleep_mode": True} if settings.sleep_level else {}),
        **settings.engine_args,
    }


def _environment(on_cpu: bool) -> dict[str, str]:
    """Variables of the engine's process."""
    found = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:  # bound to cores that are busy, the first call takes a minute
        found["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    elif world_size() > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        found["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank()] if visible else str(local_rank())
    return found
