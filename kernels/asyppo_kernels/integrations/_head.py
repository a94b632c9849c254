"""``linear_logprob`` where a trainer multiplies by its head in whatever dtype autocast says."""

from __future__ import annotations

import torch
from torch import Tensor

from asyppo_kernels.linear_logprob import LinearLogprob, linear_logprob


def head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float,
    softcap: float | None = None,
    entropy: bool = True,
) -> LinearLogprob:
    """The op on hidden [N, H], weight [V, H] and target [N] of any dtypes, computed in autocast's, or hidden's."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # Masters in float32 stay: the op rounds them, and gives them gradients that are not rounded.
    hidden, weight = (x if x.dtype in (dtype, torch.float32) else x.to(dtype) for x in (hidden, weight))
    return linear_logprob(
        hidden,
        weight,
        target,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        entropy=entropy,
        compute_dtype=dtype,
    )
