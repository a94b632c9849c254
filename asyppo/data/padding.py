"""How much of what is computed is padding."""

from __future__ import annotations

import torch
from torch import Tensor

from asyppo.distributed.processes import sum_over_ranks


class PaddingCount:
    """Counts tokens that were computed, and those among them that are no padding."""

    def __init__(self) -> None:
        self.real: list[Tensor] = []
        self.known = self.computed = 0

    def add(self, real: Tensor | int, computed: int) -> None:
        """Count a pass. ``real``, where it is on the device, stays there until somebody asks."""
        if isinstance(real, Tensor):
            self.real.append(real)
        else:
            self.known += real
        self.computed += computed

    def take(self) -> float:
        """Return the fraction of padding and start anew."""
        real = self.known + (int(torch.stack(self.real).sum()) if self.real else 0)
        counts = torch.tensor([real, self.computed])
        self.real, self.known, self.computed = [], 0, 0
        total, computed = sum_over_ranks(counts).tolist()
        return 1 - total / computed if computed else 0.0
