"""What the op returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearLogprob(NamedTuple):
    """Of each row: the target's log-prob and the entropy of its distribution, in nats, float32 [N]."""

    logprob: Tensor
    entropy: Tensor | None
