"""What stands in for attention on fake tensors: it keeps and makes what the fused kernels do.

torch's own would take another kernel there, which makes all scores at once, and transformers a mask of as many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "counted_by_asyppo_plan"


class _Fused(torch.autograd.Function):
    """Of q [..., heads, D], k and v [..., key heads, D] (flash attention, arXiv 2205.14135): inputs, output and one
    float32 a query are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def varlen(q: Tensor, k: Tensor, v: Tensor, *_: Any, enable_gqa: bool = False, **__: Any) -> Tensor:
    """As ``torch.nn.attention.varlen.varlen_attn``."""
    return _Fused.apply(q, k, v)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return _Fused.apply(*(x.transpose(1, 2) for x in (query, key, value))), None


def _mask(
    batch_size: int, q_length: int, kv_length: int, *_: Any, local_size: int | None = None, **__: Any
) -> Tensor | None:
    """As transformers' for ``sdpa``: none but for a window."""
    if local_size is None or local_size >= kv_length:
        return None
    return torch.ones(1, 1, q_length, kv_length, dtype=torch.bool).expand(batch_size, -1, -1, -1)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def stand_in(model: nn.Module) -> None:
    """Let the layers of transformers in ``model`` have it in place of ``sdpa``."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation == "sdpa":
            part.config._attn_implementation = NAME
