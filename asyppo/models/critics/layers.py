"""The layers of M transformers of one architecture, whose parameters carry a leading axis M.

They are built from M models of transformers, layer by layer, keep those models' names, and leave them holding views of
the stacked weights. Tensors are [M, N, ·] for N tokens a critic. Weights are cast to the dtype of what they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from asyppo.distributed.sharding import member
from asyppo.models.critics.inputs import PolicyInputs
from asyppo_kernels.stacked_layers import (
    stacked_embedding,
    stacked_qk_norm_rope,
    stacked_rms_norm,
    stacked_swiglu,
)

Attend = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]
MakeLinear = Callable[[Sequence[Any]], nn.Module]


def stack_parameter(modules: Sequence[nn.Module], name: str) -> nn.Parameter:
    """Return the parameters ``name`` of M modules stacked, [M, …], and make those views of it.

    Each original is let go of before the next is stacked, so that the models are not in memory twice.
    """
    own = [getattr(module, name) for module in modules]
    stacked = nn.Parameter(own[0].detach()[None] if len(own) == 1 else torch.stack([p.detach() for p in own]))
    tie(modules, name, stacked)
    return stacked


def tie(modules: Sequence[nn.Module], name: str, stacked: nn.Parameter, mesh: DeviceMesh | None = None) -> None:
    """Make the parameter ``name`` of module m a view of ``stacked[m]``, a leaf of its own; ``mesh``: see ``member``."""
    for m, module in enumerate(modules):
        setattr(module, name, nn.Parameter(member(stacked, m, mesh)))


class _BatchedLinear(torch.autograd.Function):
    """x [M, N, in], weight [M, out, in], bias [M, out] or None to x weight^T + bias. Autograd of ``bmm`` would give
    the weight's gradient transposed, to be copied into the weight's own order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            torch.bmm(grad, weight) if needs_x else None,
            torch.bmm(grad.mT, x) if needs_weight else None,
            grad.sum(1) if needs_bias else None,
        )


class StackedLinear(nn.Module):
    """M linear layers in one batched product."""

    def __init__(self, modules: Sequence[Any]):
        super().__init__()
        self.weight = stack_parameter(modules, "weight")  # [M, out, in]
        self.bias = None if modules[0].bias is None else stack_parameter(modules, "bias")  # [M, out]

    def forward(self, x: Tensor) -> Tensor:
        """Return [M, N, out] of x [M, N, in].

        A batched product is used on a CPU, too: at no size that was measured (in and out of 64 to 1536, N of 64 to
        4096, M = 1, 2, 4, one core) did M products one after another take less time beyond noise.
        """
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return _BatchedLinear.apply(x, self.weight.to(x.dtype), bias)


class StackedEmbedding(nn.Module):
    """M embedding tables, or one that all critics share."""

    def __init__(self, modules: Sequence[Any]):
        super().__init__()
        self.weight = stack_parameter(modules, "weight")  # [M, V, H]
        self.padding_idx = modules[0].padding_idx

    def forward(self, tokens: Tensor) -> Tensor:
        """Return [M, N, H] of tokens [M, N], or of [1, N] that all critics read ([1, N, H] if they share the table)."""
        count, size, _ = self.weight.shape
        offset = torch.arange(0, count * size, size, device=tokens.device)[:, None]
        out = nn.functional.embedding(tokens + offset, self.weight.flatten(0, 1))
        if self.padding_idx is not None:  # whose row gets no gradient, as in torch.nn.Embedding
            out = torch.where((tokens == self.padding_idx)[..., None], out.detach(), out)
        return out

    def beside(self, tokens: Tensor, inputs: Tensor, projection: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [M, N, H] in ``dtype``, to which a projection [M, F, H] of inputs [M, N, F], or [1, N, F], is
        added."""
        return stacked_embedding(tokens, self.weight, inputs, projection, padding_idx=self.padding_idx, dtype=dtype)


class StackedPolicyInputs(nn.Module):
    """M projections of what critics read beside the tokens."""

    def __init__(self, modules: Sequence[PolicyInputs]):
        super().__init__()
        self.weight = stack_parameter(modules, "weight")  # [M, F, H]


class StackedNorm(nn.Module):
    """M RMSNorms, or one that all critics share."""

    def __init__(self, modules: Sequence[Any]):
        super().__init__()
        self.weight = stack_parameter(modules, "weight")  # [M, H]
        self.eps = modules[0].variance_epsilon

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x [M, N, H] plus residual, normalised, and the plain sum."""
        weight = self.weight.to(x.dtype).expand(len(x), -1)  # of one that all critics share
        return stacked_rms_norm(x, weight, eps=self.eps, residual=residual)


class StackedAttention(nn.Module):
    """M self-attentions: M is one more dimension of the batch."""

    def __init__(self, modules: Sequence[Any], window: int | None, linear: MakeLinear):
        super().__init__()
        self.head_dim, self.window = modules[0].head_dim, window
        self.q_proj = linear([module.q_proj for module in modules])
        self.k_proj = linear([module.k_proj for module in modules])
        self.v_proj = linear([module.v_proj for module in modules])
        self.o_proj = linear([module.o_proj for module in modules])
        if hasattr(modules[0], "q_norm"):
            self.q_norm: StackedNorm | None = StackedNorm([module.q_norm for module in modules])
            self.k_norm: StackedNorm | None = StackedNorm([module.k_norm for module in modules])
        else:
            self.q_norm = self.k_norm = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Return [M, N, H] of x [M, N, H]."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is None or self.k_norm is None:
            q, k = stacked_qk_norm_rope(q, k, cos, sin)
        else:
            q_weight, k_weight = (w.to(x.dtype).expand(len(x), -1) for w in (self.q_norm.weight, self.k_norm.weight))
            q, k = stacked_qk_norm_rope(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=self.q_norm.eps)
        return self.o_proj(attend(q, k, v, self.window))


class StackedMLP(nn.Module):
    """M gated feed-forward layers."""

    def __init__(self, modules: Sequence[Any], linear: MakeLinear):
        super().__init__()
        self.gate_proj = linear([module.gate_proj for module in modules])
        self.up_proj = linear([module.up_proj for module in modules])
        self.down_proj = linear([module.down_proj for module in modules])

    def forward(self, x: Tensor) -> Tensor:
        """Return [M, N, H] of x [M, N, H]."""
        return self.down_proj(stacked_swiglu(self.gate_proj(x), self.up_proj(x)))


class StackedLayer(nn.Module):
    """M decoder layers, with attention or without. The last sum of a layer is left to the next norm, which adds and
    normalises in one launch."""

    def __init__(
        self,
        modules: Sequence[Any],
        window: int | None,
        gradient_checkpointing: bool,
        linear: MakeLinear = StackedLinear,
    ):
        super().__init__()
        self.attends = hasattr(modules[0], "self_attn")
        if self.attends:
            self.input_layernorm = StackedNorm([module.input_layernorm for module in modules])
            self.self_attn = StackedAttention([module.self_attn for module in modules], window, linear)
        self.post_attention_layernorm = StackedNorm([module.post_attention_layernorm for module in modules])
        self.mlp = StackedMLP([module.mlp for module in modules], linear)
        self.gradient_checkpointing = gradient_checkpointing

    def forward(
        self, hidden: Tensor, update: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream [M, N, H] and an update [M, N, H] that is still to be added to it."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(
                self._summed, hidden, cos, sin, attend, use_reentrant=False, preserve_rng_state=False
            ), None
        return self._layer(hidden, update, cos, sin, attend)

    def _layer(
        self, hidden: Tensor, update: Tensor | None, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        if self.attends:
            x, hidden = self.input_layernorm(hidden, update)
            update = self.self_attn(x, cos, sin, attend)
        x, hidden = self.post_attention_layernorm(hidden, update)
        return hidden, self.mlp(x)

    def _summed(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """With gradient checkpointing one tensor a layer is kept, not two."""
        hidden, update = self._layer(hidden, None, cos, sin, attend)
        return hidden + update
