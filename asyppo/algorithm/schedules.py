"""Learning rates as functions of the step alone, so that a run which starts again needs no scheduler's state."""

from __future__ import annotations

import math
from typing import Literal

import torch


def learning_rate_factor(
    kind: Literal["constant", "linear", "cosine"], step: int, total: int, warmup: int = 0
) -> float:
    """Return what the learning rate is multiplied by at ``step`` (from 1) of ``total``.

    It rises linearly to 1 over the first ``warmup`` steps; from there on it is that of transformers' schedulers:
    1, or 1 falling towards 0 along a line or half a cosine, which it would reach one step after the last.
    """
    if step <= warmup:
        return step / warmup
    done = (step - 1 - warmup) / max(total - warmup, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[kind]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let ``optimizer`` step at ``rate``, or at that times ``lr_ratio`` where a group of parameters has one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)
