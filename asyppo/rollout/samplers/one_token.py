"""A pass over one new token of each row, for families whose layers are known, in float32.

Of a small model, most of transformers' forward pass is not arithmetic: a mask, views, calls of modules in modules. Here
the same sums stand one behind the other; what differs is the order in which some are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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

    both: Sequence[Tensor]
    """[heads, b, width, d] each."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append [heads, b, 1, d] each."""
        ...


@dataclass(frozen=True)
class Prompts:
    """n prompts that b rows continue, on a CPU."""

    layers: list[Any]
    """``CachedLayer`` each, of n rows: a prompt is on the right of its P columns."""
    length: Tensor
    """int64 [n]."""
    of: Tensor
    """int64 [b]: which of them each row continues; rows of one prompt are neighbours."""

    @cached_property
    def seen(self) -> Tensor:
        """bool [b, P]: columns with the row's prompt."""
        width = self.layers[0].both[0].shape[2]
        return (torch.arange(width) >= (width - self.length)[:, None])[self.of]

    @cached_property
    def grid(self) -> tuple[Tensor, Tensor] | None:
        """int64 [n * G], the rows of each prompt, filled up to G with some row, and int64 [b], where each row is there;
        None where every prompt has G."""
        count = self.of.bincount(minlength=len(self.length))[:, None]
        most = torch.arange(int(count.max()))
        if bool((count == len(most)).all()):
            return None
        rows = (count.cumsum(0) - count + most.minimum(count - 1)).flatten()
        return rows, (most < count).flatten().nonzero()[:, 0]

    def together(self, x: Tensor) -> Tensor:
        """Return [heads * n, G * r, e] of x [heads, b, r, e]."""
        x = x if self.grid is None else x[:, self.grid[0]]
        return x.reshape(x.shape[0] * self.length.shape[0], -1, x.shape[3])

    def apart(self, x: Tensor, heads: int, r: int) -> Tensor:
        """Return [heads * b, r, e] of x [heads * n, G * r, e]."""
        if self.grid is None:
            return x.view(-1, r, x.shape[2])
        return x.view(heads, -1, r, x.shape[2])[:, self.grid[1]].flatten(0, 1)


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
        body: Any = model.base_model
        self.embedding, self.rotary = body.embed_tokens.weight, body.rotary_emb
        self.layers = [_Layer(layer) for layer in body.layers]
        self.norm = _Norm(body.norm)
        self.head: Any = model.get_output_embeddings()

    @torch.inference_mode()
    def __call__(
        self,
        tokens: Tensor,
        position: Tensor,
        seen: Tensor | None,
        cache: Sequence[CachedLayer],
        prompts: Prompts | None = None,
    ) -> Tensor:
        """Return float32 [b, V], the logits of what follows ``tokens``.

        Args:
            tokens: int64 [b]; their keys and values are appended to ``cache``.
            position: int64 [b], theirs.
            seen: bool [b, width]: columns of ``prompts``, if any, and of the cache, with that of ``tokens``, that a row
                reads; None: all.
            cache: a layer each.
            prompts: what is in front of the cache's first column; None: nothing.
        """
        x = F.embedding(tokens, self.embedding)
        rotation = self.layers[0].rotation(*self.rotary(x, position[:, None]))
        mask = None if seen is None else torch.zeros(seen.shape, device=x.device).masked_fill(~seen, -torch.inf)
        mask = None if mask is None else mask[:, None, None]
        for number, (layer, cached) in enumerate(zip(self.layers, cache, strict=True)):
            q = layer.heads(layer.input_norm(x), *rotation, cached)
            if prompts is None:
                keys, values = (x.transpose(0, 1) for x in cached.both)
                out = F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, mask, scale=1.0)
            else:
                out = attention_behind(prompts, prompts.layers[number], q, cached, mask)
            x = layer.o(out.reshape(x.shape[0], -1), x)
            y = layer.post_norm(x)
            x = layer.down(F.silu(layer.gate(y)).mul_(layer.up(y)), x)
        return head_product(self.norm(x), self.head)


class _Layer:
    """The weights of a decoder layer, and its sums but for attention's."""

    def __init__(self, layer: Any):
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm, self.post_norm = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.qkv = [_Linear(module) for module in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.d = attention.head_dim
        self.queries, self.keys, _ = (module.size // self.d for module in self.qkv)
        self.norms = [_Norm(attention.q_norm), _Norm(attention.k_norm)] if hasattr(attention, "q_norm") else None
        self.o = _Linear(attention.o_proj)
        self.gate, self.up, self.down = (_Linear(m) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def rotation(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``heads`` needs of cos and sin [b, 1, D]: [b, heads, D] each, for those of queries and of keys.
        (-second, first) sin is (second, first) (-sin, sin), and queries get the scale of their products with keys."""
        scale = cos.new_ones(self.queries + self.keys, 1)
        scale[: self.queries] = self.d**-0.5
        half = self.d // 2
        return scale * cos, scale * torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor, cached: CachedLayer) -> Tensor:
        """Return the queries, [heads, b, r, d], of x [b, H], and append its keys and values to ``cached``. The r heads
        that share a key and a value stand where a sequence has its tokens."""
        q, k = self.queries, self.queries + self.keys
        x = torch.cat([linear(x) for linear in self.qkv], dim=1).view(x.shape[0], -1, self.d)
        if self.norms is not None:
            for norm, part in zip(self.norms, (x[:, :q], x[:, q:k]), strict=True):
                part.copy_(norm(part))
        turned = torch.addcmul(x[:, :k] * cos, x[:, :k].roll(self.d // 2, -1), sin)
        cached.append(turned[:, q:, None].transpose(0, 1), x[:, k:, None].transpose(0, 1))
        return turned[:, :q].view(-1, self.keys, self.queries // self.keys, self.d).transpose(0, 1)


class _Linear:
    def __init__(self, module: nn.Linear):
        self.weight, self.bias, self.size = module.weight.t(), module.bias, len(module.weight)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Add the product to ``residual``."""
        if residual is None:
            return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)
        return torch.addmm(residual if self.bias is None else residual + self.bias, x, self.weight)


class _Norm:
    def __init__(self, module: Any):
        self.eps, size = module.variance_epsilon, len(module.weight)
        self.weight = module.weight
        self.large, self.small = self.weight * size**0.5, torch.tensor((size * self.eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # The same in four operations where a CPU's rms_norm has eight.
        return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self.small)).mul_(self.large)


def attention_behind(prompts: Prompts, prompt: CachedLayer, q: Tensor, own: CachedLayer, mask: Tensor | None) -> Tensor:
    """Return the attention [b, heads, r, d] of queries [heads, b, r, d], scaled, to keys and values of their prompts
    and to their own; ``mask`` [b, 1, 1, P + own] is added to the scores. Most of its time goes into reading what fits
    in no cache: here a prompt is read for all its rows at once."""
    heads, b, r, d = q.shape
    q = q.contiguous()
    prompt_keys, prompt_values, keys, values = (x.flatten(0, 1) for x in (*prompt.both, *own.both))
    to_prompt = prompts.apart(torch.bmm(prompts.together(q), prompt_keys.mT), heads, r)
    scores = torch.cat([to_prompt, torch.bmm(q.view(-1, r, d), keys.mT)], dim=-1).view(heads, b, r, -1)
    share = (scores if mask is None else scores.add_(mask[:, 0])).softmax(-1)
    width = to_prompt.shape[2]
    out = prompts.apart(torch.bmm(prompts.together(share[..., :width]), prompt_values), heads, r)
    out = out.baddbmm(share.view(heads * b, r, -1)[..., width:], values)
    return out.view(q.shape).transpose(0, 1)


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
