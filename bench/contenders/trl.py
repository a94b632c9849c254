"""TRL: its default path over logits, its kernel over logits, and its fused LM head."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from bench.cases import Case, Head
from bench.contenders.heads import policy_head
from bench.ops.policy_head import wants_entropy
from bench.registry import need, need_gpu

SEQUENCE = 1024  # tokens; TRL's default path goes sequence by sequence


@policy_head("trl logits path")
def logits_path(case: Case) -> Head:
    """What its trainers call on the model's logits: its Triton kernel where that applies, else torch."""
    utils = need("trl.trainer.utils")
    temperature, entropy = float(case.options["temperature"]), wants_entropy(case)
    sequences = max(1, case.sizes["N"] // SEQUENCE)

    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = F.linear(hidden, weight).unflatten(0, (sequences, -1))
        index = target.unflatten(0, (sequences, -1))
        if not entropy:
            return utils.selective_log_softmax(logits, index, temperature=temperature).flatten(), None
        logprob, entropies = utils.selective_log_softmax_and_entropy(logits, index, temperature=temperature)
        return logprob.flatten(), entropies.flatten()

    return head


@policy_head("trl.kernels over logits")
def kernel_over_logits(case: Case) -> Head:
    """Its Triton kernel of log-prob and entropy, on whole logits."""
    kernels = need("trl.kernels")
    need_gpu(case)
    temperature = float(case.options["temperature"])

    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return kernels.selective_log_softmax_and_entropy(F.linear(hidden, weight), target, temperature=temperature)

    return head


@policy_head("trl fused LM head", accumulates=("d_hidden", "d_weight"))
def fused_lm_head(case: Case) -> Head:
    """Its chunked head, with the chunk its trainers pass."""
    function = need("trl.kernels").ChunkedLogProbFunction
    chunk = need("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    temperature = float(case.options["temperature"])
    outputs = ("entropy",) if wants_entropy(case) else ()

    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return function.apply(hidden, weight, None, target, temperature, chunk, None, 1.0, outputs)[:2]

    return head
