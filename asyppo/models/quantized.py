"""Models in 4 bits under adapters (QLoRA, arXiv 2305.14314), by bitsandbytes through transformers and peft.

The linear layers of the body are kept as 4-bit NormalFloats, blocks of 64 with a scale, which is itself kept in 8 bits;
embeddings, norms and the head, whose weight goes into the fused ops, are whole. Layers widen their weight for each
pass. Where models are sharded, each rank has all of this, and shards of what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from asyppo.config import AsyPPOConfig, ConfigError

BYTES_PER_PARAMETER = 1 / 2 + (1 + 4 / 256) / 64
"""Of a layer in 4 bits: half a byte, a scale in one byte for 64 numbers, and a float32 for 256 scales."""


def check_bitsandbytes(config: AsyPPOConfig) -> None:
    """Raise ConfigError if a setting needs bitsandbytes, and it is not installed."""
    critics = config.num_critics > 0
    needing = {
        "optim": config.optim if config.optim == "adamw_8bit" else None,
        "critic.optim": config.critic.optim if config.critic.optim == "adamw_8bit" and critics else None,
        "policy.load_in_4bit": config.policy.load_in_4bit,
        "critic.load_in_4bit": config.critic.load_in_4bit and critics,
    }
    for name, got in needing.items():
        if got and find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"{name}: got {got!r}, needs bitsandbytes, which is not installed: pip install 'asyppo[bitsandbytes]'"
            )


def options_of_4_bits(device: torch.device, dtype: torch.dtype, skip: list[str] | None = None) -> dict[str, Any]:
    """Return the arguments with which ``from_pretrained`` loads a model in 4 bits, to compute in ``dtype``. Linear
    layers whose name ends as one in ``skip`` stay whole; None: the head."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )
    if device == torch.device("cuda"):  # threads read the weights, whose own GPU is the first
        device = torch.device("cuda", torch.cuda.current_device())
    return {"quantization_config": quantization, "device_map": {"": device}}


def layers_in_4_bits(model: nn.Module) -> Iterator[Any]:
    """Yield the layers of ``model`` that are kept in 4 bits."""
    return (part for part in model.modules() if getattr(getattr(part, "weight", None), "quant_state", None) is not None)


def is_in_4_bits(model: nn.Module) -> bool:
    """Whether any layer of ``model`` is."""
    return next(layers_in_4_bits(model), None) is not None


def kept_whole(model: nn.Module) -> set[nn.Parameter]:
    """Return what every rank keeps whole of a ``model`` that is sharded: if layers are in 4 bits, all that is frozen,
    which is in the precision of passes, and has no gradient to sum."""
    return {p for p in model.parameters() if not p.requires_grad} if is_in_4_bits(model) else set()


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the layers of ``model`` that are kept in 4 bits widen their weights to ``dtype``, and compute in it.

    On CPUs with bfloat16 instructions bitsandbytes would repack the weights of a model in eval mode for kernels that
    have no backward pass and compute in bfloat16 whatever comes; that is turned off.
    """
    for layer in layers_in_4_bits(model):
        layer.weight.quant_state.dtype = dtype
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            layer.support_avx512bf16_for_cpu = False


def widened(weight: Tensor) -> Tensor:
    """Return what a ``weight`` in 4 bits stands for; any other stands for itself."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def product_in_4_bits(x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
    """Return x [..., in] weight^T + bias, [..., out], in the precision of ``x``, for a ``weight`` in 4 bits. Gradients
    go to ``x``."""
    from bitsandbytes import matmul_4bit

    return matmul_4bit(x, weight, quant_state=weight.quant_state, bias=bias)
