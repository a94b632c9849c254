"""One AdamW over all critics; gradient norm, clipping and skipping are each critic's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from asyppo.algorithm.schedules import set_learning_rate
from asyppo.distributed.sharding import clip_gradients, total_norms
from asyppo.models.critics.base import Critics
from asyppo.models.critics.inputs import is_projection
from asyppo.models.optimizers import Optim, make_optimizer, new_state


class CriticOptimizer:
    """Steps the parameters of ``critics.models``; ``adamw`` is the optimizer, over all of them."""

    def __init__(
        self,
        critics: Critics,
        *,
        learning_rate: float,
        weight_decay: float,
        optim: Optim = "adamw",
        policy_inputs_lr_ratio: float = 1.0,
    ):
        """``optim``: see ``make_optimizer``. Projections of what critics read beside the tokens step at
        ``policy_inputs_lr_ratio`` times the learning rate, and decay as the rest."""
        self.critics = critics
        named = [[(name, p) for name, p in m.named_parameters() if p.requires_grad] for m in critics.models]
        self.parameters = [[p for _, p in own] for own in named]
        ratio = policy_inputs_lr_ratio
        every = [pair for own in named for pair in own]
        # At 1 all are one group, as in checkpoints from before there was a ratio.
        projections = [p for name, p in every if ratio != 1.0 and is_projection(name)]
        rest = [p for name, p in every if ratio == 1.0 or not is_projection(name)]
        groups: list[dict[str, Any]] = [{"params": rest}]
        if projections:
            groups.append({"params": projections, "lr_ratio": ratio, "weight_decay": weight_decay / ratio})
        self.adamw = make_optimizer(groups, optim, learning_rate=learning_rate, weight_decay=weight_decay)
        set_learning_rate(self.adamw, learning_rate)
        for p in (p for own in self.parameters for p in own):
            # There from the start, so that a checkpoint has it for a critic, too, whose updates were all skipped.
            self.adamw.state[p] = new_state(self.adamw, p)

    def step(
        self,
        losses: Tensor,
        max_grad_norm: float,
        *,
        active: Sequence[bool],
        by: Callable[[torch.optim.Optimizer], None] = methodcaller("step"),
    ) -> list[float | None]:
        """Clip each critic's gradient norm to ``max_grad_norm``, step, ``by`` that, and drop the gradients.

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
        by(self.adamw)
        self.critics.release_gradients()
        return found
