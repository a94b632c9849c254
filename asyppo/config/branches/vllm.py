"""Settings below ``vllm``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from asyppo.config.setting import one_or_list, setting


@dataclass
class VLLMConfig:
    """``sampler: vllm``: where the engine runs, and how. See ``docs/vllm.md``."""

    url: list[str] = setting(factory=list)
    """Servers that somebody has started, such as ``http://127.0.0.1:8000``; they take turns with the prompts. Empty: a
    process of its own on this machine, one a rank."""
    python: str | None = None
    """Interpreter of the environment that has vLLM, for the process; None: this one's."""
    gpu_memory_utilization: float = setting(0.3, above=0, at_most=1, elsewhere=("vllm_gpu_memory_utilization",))
    """Fraction of the GPU's memory (of the machine's, on a CPU) that the process may take. TRL's default."""
    tensor_parallel_size: int = setting(1, at_least=1, elsewhere=("vllm_tensor_parallel_size",))
    """GPUs that the process shards the model over."""
    max_model_len: int | None = setting(None, at_least=1, elsewhere=("vllm_max_model_length",))
    """Longest prompt and response together, in tokens. None: ``data.max_prompt_length`` and
    ``max_completion_length``, or without the former what the model's positions allow."""
    sleep_level: Literal[0, 1, 2] = setting(0, elsewhere=("vllm_enable_sleep_mode",))
    """What the process gives back of a GPU's memory while the trainer updates: 0, nothing; 1, the cache, and the
    weights go to the host; 2, both go, and all weights are sent again. On a CPU vLLM does not sleep."""
    enforce_eager: bool | None = None
    """Compile nothing and record no CUDA graphs: a quicker start, slower generation. None: on a CPU."""
    seeded: bool = True
    """Give each request a seed, so that a batch that is drawn again is the same. False leaves chance to the engine,
    which is quicker with many responses at once."""
    weight_transfer: Literal["directory", "nccl"] = "directory"
    """How weights get to servers: by a ``directory`` in shared memory, or over ``nccl`` by vLLM's own weight transfer,
    for which the trainer's environment has vLLM, too, and servers are started with ``--weight-transfer-config
    '{"backend": "nccl"}'``."""
    weight_transfer_address: str | None = None
    """Address of this machine at which servers find the trainer with ``nccl``. None: the one from which it reaches the
    first of them."""
    weights_dir: str | None = None
    """Where directories of weights are made on their way to the engine; servers on other machines need one that they
    share. None: ``/dev/shm``."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``vllm.LLM`` for the process, such as ``{kv_cache_memory_bytes: 4294967296}``."""
    start_timeout: float = setting(600.0, above=0, noun="number of seconds")
    """Seconds that the engine may take to start; servers, to be there."""
    timeout: float = setting(1800.0, above=0, noun="number of seconds")
    """Seconds that it may take for a batch of responses, or for new weights; then it counts as hung, and the run ends
    with an error, saved."""

    def __post_init__(self) -> None:
        """One address in place of a list of them is that list."""
        self.url = one_or_list("url", self.url)
