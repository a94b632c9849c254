"""The result type of ``ensemble_value``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class EnsembleValue(NamedTuple):
    """What ``ensemble_value`` returns; all float32."""

    value: Tensor
    """[M, N], differentiable."""
    mean: Tensor
    """[N], mean over the critics, detached."""
    std: Tensor
    """[N], population standard deviation over the critics, detached."""
