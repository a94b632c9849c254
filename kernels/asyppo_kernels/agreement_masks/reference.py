"""The definition of ``agreement_masks``, by a sort."""

from __future__ import annotations

from torch import Tensor

from asyppo_kernels.agreement_masks.result import AgreementMasks


def agreement_masks_reference(
    std: Tensor, mask: Tensor, *, advantage_fraction: float = 0.2, entropy_fraction: float = 0.2
) -> AgreementMasks:
    """Return advantage_keep, entropy_keep, low and high; see ``agreement_masks``."""
    ordered = std[mask].sort().values
    n = len(ordered)
    low = high = std.new_zeros(())
    if n > 0:
        low = ordered[round(advantage_fraction * 1e6) * n // 10**6]
        high = ordered[n - 1 - round(entropy_fraction * 1e6) * n // 10**6]
    return AgreementMasks(mask & ~(std < low), mask & ~(std > high), low, high)
