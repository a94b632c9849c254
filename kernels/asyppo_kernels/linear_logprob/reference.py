"""The definition: whole logits, any floating dtype, gradients by plain autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from asyppo_kernels.linear_logprob.result import LinearLogprob


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
) -> LinearLogprob:
    """Log-prob of each target and entropy of each row of softmax(z), in the dtype of ``hidden``."""
    counts = target != -100
    z = hidden.where(counts[:, None], 0) @ weight.T
    if bias is not None:
        z = z + bias
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(z / temperature, dim=1)
    logprob = logp.gather(1, target.where(counts, 0)[:, None]).squeeze(1).where(counts, 0)
    return LinearLogprob(logprob, -(logp.exp() * logp).sum(dim=1).where(counts, 0) if entropy else None)
