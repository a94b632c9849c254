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
