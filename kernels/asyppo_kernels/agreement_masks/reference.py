"""The definition of ``agreement_masks``, by a sort."""

from __future__ import annotations

from torch import Tensor


def agreement_masks_reference(
    std: Tensor, mask: Tensor, *, advantage_fraction: float = 0.2, entropy_fraction: float = 0.2
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return advantage_keep, entropy_keep, low and high; see ``agreement_masks``."""
    ordered = std[mask].sort().values
    n = len(ordered)
    low = high = std.new_zeros(())
    if n > 0:
        low = ordered[round(advantage_fraction * 1e6) * n // 10**6]
        high = ordered[n - 1 - round(entropy_fraction * 1e6) * n // 10**6]
    return mask & ~(std < low), mask & ~(std > high), low, high
