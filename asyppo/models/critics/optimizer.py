"""One AdamW over all critics; gradient norm, clipping and skipping are each critic's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from asyppo.distributed.sharding import clip_gradients, total_norms
from asyppo.models.critics.base import Critics
from asyppo.models.optimizers import Optim, make_optimizer, new_state


class CriticOptimizer:
    """Steps the parameters of ``critics.models``; ``adamw`` is the optimizer, over all of them."""

    def __init__(self, critics: Critics, *, learning_rate: float, weight_decay: float, optim: Optim = "adamw"):
        """``optim``: see ``make_optimizer``."""
        self.critics = critics
        self.parameters = [[p for p in model.parameters() if p.requires_grad] for model in critics.models]
        everything = [p for own in self.parameters for p in own]
        self.adamw = make_optimizer(everything, optim, learning_rate=learning_rate, weight_decay=weight_decay)
        for p in everything:
            # There from the start, so that a checkpoint has it for a critic, too, whose updates were all skipped.
            self.adamw.state[p] = new_state(self.adamw, p)

    def step(self, losses: Tensor, max_grad_norm: float, *, active: Sequence[bool]) -> list[float | None]:
        """Clip each critic's gradient norm to ``max_grad_norm``, step, and drop the gradients.

        Returns the norms before clipping, None for a critic whose loss [M] or norm is not finite: it keeps its weights
        and its optimizer state, as does one that is not ``active``; the others step.
        """
        self.critics.collect_gradients()
        gradients = [[p.grad for p in own if p.grad is not None] for own in self.parameters]
        norms = total_norms(gradients)
        # The only time the host waits.
        host = torch.stack([norms.to(losses.device), losses]).tolist()
        found: list[float | None] = []
        for m, (norm_on_host, loss) in enumerate(zip(*host, strict=True)):
            finite = math.isfinite(norm_on_host) and math.isfinite(loss)
            found.append(norm_on_host if finite else None)
            if finite and active[m]:
                clip_gradients(gradients[m], max_grad_norm, norms[m])
            else:
                for parameter in self.parameters[m]:
                    parameter.grad = None
        self.adamw.step()
        self.critics.release_gradients()
        return found
