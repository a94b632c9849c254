"""The definition of ``ensemble_value``, in any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from asyppo_kernels.ensemble_value.result import EnsembleValue


def ensemble_value_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> EnsembleValue:
    """Return value [M, N], mean [N] and std [N]; see ``ensemble_value``."""
    value = torch.einsum("knh,kh->kn", hidden, weight)
    if bias is not None:
        value = value + bias[:, None]
    scores = value.detach()
    return EnsembleValue(value, scores.mean(0), scores.std(0, correction=0))
