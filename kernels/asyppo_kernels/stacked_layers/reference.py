"""The definitions of the stacked layers, in any float dtype and without a rounding in between."""

from __future__ import annotations

import torch
from torch import Tensor


def stacked_rms_norm_reference(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return normed and summed [M, N, H]; see ``stacked_rms_norm``."""
    summed = x if residual is None else x + residual
    mean_square = summed.square().mean(-1, keepdim=True)
    return summed / torch.sqrt(mean_square + eps) * weight[:, None, :], summed


def stacked_qk_norm_rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Return q [M, N, Hq, D] and k [M, N, Hk, D]; see ``stacked_qk_norm_rope``."""

    def one(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight[:, None, None, :]
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(-2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(-2)

    return one(q, q_weight), one(k, k_weight)


def stacked_swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Return [M, N, I]; see ``stacked_swiglu``."""
    return gate * torch.sigmoid(gate) * up


def stacked_embedding_reference(
    tokens: Tensor, weight: Tensor, inputs: Tensor, projection: Tensor, *, padding_idx: int | None = None
) -> Tensor:
    """Return [M, N, H]; see ``stacked_embedding``."""
    out = []
    for m, own in enumerate(projection):
        ids, table, read = (x[m % len(x)] for x in (tokens, weight, inputs))
        found = torch.nn.functional.embedding(ids, table, padding_idx=padding_idx)
        out.append(found + read.to(own.dtype) @ own)
    return torch.stack(out)
