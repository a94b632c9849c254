"""``ensemble_value`` in torch, forward and backward, accumulated in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_and_std(value: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation over the leading dimension of a float32 tensor.

    Both are taken of the differences from the first row: where all rows agree the standard deviation is exactly zero,
    and values that are large beside their spread lose nothing to cancellation.
    """
    if value.shape[0] == 1:
        return value[0].clone(), torch.zeros_like(value[0])
    if value.shape[0] == 2:
        gap = value[1] - value[0]
        return value[0].add(gap, alpha=0.5), gap.abs_().mul_(0.5)
    offset = value - value[0]
    shift = offset.mean(0)
    return value[0] + shift, (offset - shift).square().mean(0).sqrt()


def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return value [M, N], mean [N] and std [N]."""
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would round the product to its own dtype
        # Row times matrix: a CPU takes several times as long for matrix times column.
        value = torch.bmm(weight.float().unsqueeze(1), hidden.float().transpose(1, 2)).squeeze(1)
    if bias is not None:
        value += bias.float().unsqueeze(-1)
    return value, *mean_and_std(value)


def backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias_dtype: torch.dtype, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of hidden, weight and bias for ``grad`` [M, N]; one that is not needed is empty."""
    grad_hidden = hidden.new_empty(0)
    grad_weight = weight.new_empty(0)
    grad_bias = grad.new_empty(0, dtype=bias_dtype)
    if needs[0]:
        grad_hidden = torch.mul(grad.unsqueeze(-1), weight.float().unsqueeze(1), out=torch.empty_like(hidden))
    if needs[1]:
        with torch.autocast(hidden.device.type, enabled=False):
            grad_weight = torch.bmm(grad.unsqueeze(1), hidden.float()).squeeze(1).to(weight.dtype)
    if needs[2]:
        grad_bias = grad.sum(1).to(bias_dtype)
    return grad_hidden, grad_weight, grad_bias
