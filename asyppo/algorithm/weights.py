"""What each token weighs in a loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def token_weights(mask: Tensor, rows: Tensor, aggregation: Literal["sequence-mean", "token-mean"]) -> Tensor:
    """Weight [B, T] of each token of ``mask`` in the loss of the minibatch ``rows`` (int64 [b]), 0 elsewhere.

    Every normalisation is in it, so the losses and gradients of micro-batches add up to those of the minibatch. A
    token that an agreement mask drops still counts in it, and so does, in ``sequence-mean``, a row without tokens.
    """
    chosen = torch.zeros_like(mask)
    chosen[rows] = mask[rows]
    if aggregation == "sequence-mean":
        weight = 1.0 / (mask.sum(dim=1, keepdim=True).clamp(min=1) * len(rows))
    else:
        weight = 1.0 / chosen.sum().clamp(min=1)
    return torch.where(chosen, weight, 0.0)
