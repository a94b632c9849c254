"""A pass over one new token of each row, for families whose layers are known, in float32.

Of a small model, most of transformers' forward pass is not arithmetic: a mask, views, calls of modules in modules. Here
the same sums stand one behind the other; what differs is the order in which some are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

from asyppo.models.families import FAMILIES, PROJECTIONS, why_unknown

MODELS = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
HEAD_ROWS = 2048
"""Rows of the head that a product takes at once on a CPU, so that the cache holds them and what comes out."""


class CachedLayer(Protocol):
    """Keys and values of a layer."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append to keys and values, and return all of them, [b, heads, width, d]."""
        ...


def why_not_by_token(model: PreTrainedModel) -> str | None:
    """Return why this pass is not the one of ``model``, None if it is."""
    body: Any = model.base_model
    if type(model) not in MODELS:
        return f"{type(model).__name__} is none of {', '.join(known.__name__ for known in MODELS)}"
    if (unknown := why_unknown(model)) is not None:
        return unknown
    if any(FAMILIES[type(body)](layer, body.config) is not None for layer in body.layers):
        return "its attention has a window"
    if {(p.dtype, p.device) for p in model.parameters()} != {(torch.float32, model.device)}:
        return "its weights are not all in float32 and on one device"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return f"{name or 'it'} has a hook"
        if name.endswith((*PROJECTIONS, "lm_head")) and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}"
    return None


class OneTokenPass:
    """``model`` is one that ``why_not_by_token`` has nothing against; its weights are read as they are."""

    def __init__(self, model: PreTrainedModel):
        self.body: Any = model.base_model
        self.head: Any = model.get_output_embeddings()

    def __call__(self, tokens: Tensor, position: Tensor, seen: Tensor | None, cache: Sequence[CachedLayer]) -> Tensor:
        """Return float32 [b, V], the logits of what follows ``tokens``.

        Args:
            tokens: int64 [b]; their keys and values are appended to ``cache``.
            position: int64 [b], theirs.
            seen: bool [b, width]: columns of the cache, with that of ``tokens``, that a row reads; None: all.
            cache: a layer each.
        """
        x = F.embedding(tokens, self.body.embed_tokens.weight)
        cos, sin = self.body.rotary_emb(x, position[:, None])  # [b, 1, D]
        # (-second, first) sin is (second, first) (-sin, sin).
        half = cos.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        mask = None if seen is None else torch.zeros(seen.shape, device=x.device).masked_fill(~seen, -torch.inf)
        mask = None if mask is None else mask[:, None, None]
        for layer, cached in zip(self.body.layers, cache, strict=True):
            x = x + self._attention(layer.self_attn, _normed(layer.input_layernorm, x), cos, sin, mask, cached)
            y, mlp = _normed(layer.post_attention_layernorm, x), layer.mlp
            x = x + _linear(mlp.down_proj, F.silu(_linear(mlp.gate_proj, y)).mul_(_linear(mlp.up_proj, y)))
        return head_product(_normed(self.body.norm, x), self.head)

    def _attention(
        self, attention: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cached: CachedLayer
    ) -> Tensor:
        """[b, H] of x [b, H]; cos and sin [b, 1, D], mask [b, 1, 1, width]."""
        b, d = len(x), attention.head_dim
        q, k = _linear(attention.q_proj, x).view(b, -1, d), _linear(attention.k_proj, x).view(b, -1, d)
        if hasattr(attention, "q_norm"):
            q, k = _normed(attention.q_norm, q), _normed(attention.k_norm, k)
        q, k = (torch.addcmul(y * cos, y.roll(d // 2, -1), sin) for y in (q, k))
        v = _linear(attention.v_proj, x).view(b, -1, d)
        keys, values = cached.update(k[:, :, None], v[:, :, None])
        # Heads that share a key and a value stand where a sequence has its tokens.
        out = F.scaled_dot_product_attention(q.view(b, k.shape[1], -1, d), keys, values, mask)
        return _linear(attention.o_proj, out.reshape(b, -1))


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def _normed(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def head_product(x: Tensor, head: nn.Linear) -> Tensor:
    """Return float32 [b, V] of x [b, H].

    A CPU multiplies some rows of a large weight at a time, with x as columns: that takes 0.59 to 0.92 of one product's
    time (b of 8 to 256, H of 128 to 768, V of 32,000 and 151,936, one core).
    """
    if x.device.type != "cpu" or len(head.weight) <= 4 * HEAD_ROWS:
        return F.linear(x, head.weight, head.bias)
    logits = x.new_empty(len(x), len(head.weight))
    for rows, out in zip(head.weight.split(HEAD_ROWS), logits.split(HEAD_ROWS, dim=1), strict=True):
        out.copy_(torch.mm(rows, x.t()).t())
    return logits if head.bias is None else logits.add_(head.bias)
