"""The result type of ``ensemble_gae``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class EnsembleGAE(NamedTuple):
    """What ``ensemble_gae`` returns; all [B, T], float32, detached, 0 at masked steps."""

    advantage: Tensor
    """GAE with ``lam`` on the mean value."""
    returns: Tensor
    """GAE with ``value_lam`` on the mean value, plus the mean value: the critics' target."""
    mean: Tensor
    """Mean over the critics."""
    std: Tensor
    """Population standard deviation over the critics."""
