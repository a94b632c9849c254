"""What the loss returns: to its caller, and from its forms to autograd."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LinearPPOLoss(NamedTuple):
    """The loss, and of each row, detached: log-prob and entropy in nats, ratio, and whether the clip stopped it."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor


class RowResults(NamedTuple):
    """Of each row, [N]: its share of the loss, and the statistics."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor


class LossAndGradients(NamedTuple):
    """Loss, statistics [N], and the float32 gradients of the loss, empty where not needed."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    ratio: Tensor
    clipped: Tensor
    d_hidden: Tensor
    d_weight: Tensor
    d_bias: Tensor
