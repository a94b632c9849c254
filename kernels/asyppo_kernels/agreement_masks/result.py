"""The result type of ``agreement_masks``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AgreementMasks(NamedTuple):
    """What ``agreement_masks`` returns."""

    advantage_keep: Tensor
    """Bool, std's shape: False where the critics agree, and where ``mask`` is False."""
    entropy_keep: Tensor
    """Bool, std's shape: False where the critics diverge, and where ``mask`` is False."""
    low: Tensor
    """0-d float32: tokens below it leave the advantage term."""
    high: Tensor
    """0-d float32: tokens above it leave the entropy term."""
