"""The stacked layers as the eager expressions of transformers, rounded where those round; autograd is torch's.

On a CPU this is what the same layers cost one critic at a time, in one call for all: a custom op with a backward of its
own would cost small critics more than it saves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension with statistics in float32; ``weight`` broadcasts."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return normed and summed [M, N, H]."""
    summed = x if residual is None else x + residual
    return _rms_norm(summed, weight.unsqueeze(1), eps), summed


def qk_norm_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the rotated q [M, N, Hq, D] and k [M, N, Hk, D]."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        y = x if weight is None else _rms_norm(x, weight[:, None, None], eps)
        first, second = y.chunk(2, dim=-1)
        return (y * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

    return one(q, q_weight), one(k, k_weight)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up [M, N, I]."""
    return silu(gate) * up


def embedding(
    tokens: Tensor, weight: Tensor, inputs: Tensor, projection: Tensor, padding_idx: int | None, dtype: torch.dtype
) -> Tensor:
    """Return [M, N, H] in ``dtype``."""
    tables, size, _ = weight.shape
    offset = torch.arange(0, tables * size, size, device=tokens.device)[:, None]
    found = torch.nn.functional.embedding(tokens + offset, weight.flatten(0, 1))
    if padding_idx is not None:  # whose row gets no gradient, as in torch.nn.Embedding
        found = torch.where((tokens == padding_idx)[..., None], found.detach(), found)
    m = len(projection)
    found, inputs = found.float().expand(m, -1, -1), inputs.expand(m, -1, -1)
    return torch.baddbmm(found, inputs, projection.float()).to(dtype)


def embedding_weight_gradient(
    grad: Tensor, tokens: Tensor, tables: int, size: int, padding_idx: int | None, dtype: torch.dtype
) -> Tensor:
    """Return the gradient [tables, size, H] of the embeddings, for that of the result, ``grad`` [M, N, H]."""
    m, _, h = grad.shape
    offset = torch.arange(m, device=tokens.device)[:, None] * (size if tables > 1 else 0)
    rows = (tokens + offset).flatten()
    # Sorted, not added atomically: autograd's own way for an embedding.
    whole = torch.ops.aten.embedding_dense_backward(grad.to(dtype).flatten(0, 1), rows, tables * size, -1, False)
    whole = whole.view(tables, size, h)
    if padding_idx is not None:
        whole[:, padding_idx] = 0
    return whole
