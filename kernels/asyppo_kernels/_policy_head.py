"""What the two policy-head ops share: logits of some rows, their statistics, and the gradient of those statistics.

The functions work in place on one float32 block of logits [n, V], so a chunk of rows costs ``BLOCKS`` such blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from asyppo_kernels._args import FLOATS, check_number, check_tensor
from asyppo_kernels._gemm import mm_f32

IGNORE_TARGET = -100
TILE = 128  # rows or columns of a tile of a matrix product
BLOCKS = 3  # float32 blocks of logits alive at once below: z, a product of its size, and the slope of the softcap
GPU_WORKSPACE_BYTES = 5 * 2**29  # 2.5 GiB
CPU_WORKSPACE_BYTES = 2**25  # a block that stays near the cache is faster than a larger one
LOWEST = -1e20  # stands in for a logit of -inf: exp of both is 0, but 0 * -inf is NaN


class HeadOptions(NamedTuple):
    """How hidden becomes logits: z = softcap(hidden weight^T + bias) / temperature."""

    temperature: float
    softcap: float | None
    logits_dtype: torch.dtype


class RowStats(NamedTuple):
    """Of each row of logits: the target's log-prob, the entropy, the maximum, and log sum exp(z - max)."""

    logprob: Tensor
    entropy: Tensor  # empty if not asked for
    row_max: Tensor
    log_sum: Tensor


def check_policy_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logits_dtype: torch.dtype,
) -> None:
    """Raise ValueError, naming the argument, unless these describe a policy head and its targets."""
    check_tensor("hidden", hidden, shape=[None, None], needs="[N, H]", dtypes=FLOATS)
    n, h = hidden.shape
    device = hidden.device
    check_tensor("weight", weight, shape=[None, h], needs=f"[V, H] = [V, {h}]", dtypes=[hidden.dtype], device=device)
    v = weight.shape[0]
    if v == 0 or h == 0:
        raise ValueError(f"weight: got shape {list(weight.shape)}, needs [V, H] with V and H at least 1")
    check_tensor("target", target, shape=[n], needs=f"[N] = [{n}]", dtypes=[torch.int64], device=device)
    if bias is not None:
        check_tensor("bias", bias, shape=[v], needs=f"[V] = [{v}]", dtypes=FLOATS, device=device)
    check_number("temperature", temperature, "a number above 0", low=0.0, low_open=True)
    if softcap is not None:
        check_number("softcap", softcap, "a number above 0, or None", low=0.0, low_open=True)
    if logits_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"logits_dtype: got {logits_dtype!r}, needs torch.float32 or torch.bfloat16")


def gradient_buffers(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    dtype: torch.dtype | None = None,
    *,
    empty: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros (or, with ``empty``, memory as it comes) for (d_hidden, d_weight, d_bias); a gradient not needed has no
    elements, since a custom op returns no optional tensor."""

    def buffer(x: Tensor | None, need: bool) -> Tensor:
        like = x if need and x is not None else hidden.new_empty(0)
        return torch.empty_like(like, dtype=dtype) if empty else torch.zeros_like(like, dtype=dtype)

    return buffer(hidden, need_hidden), buffer(weight, need_weight), buffer(bias, need_bias)


def lines_per_block(
    length: int,
    device: torch.device,
    workspace_bytes: int | None = None,
    *,
    bytes_per_element: int = 4 * BLOCKS,
) -> int:
    """How many rows of ``length`` logits (or columns of ``length`` rows) fit the workspace; at least one."""
    if workspace_bytes is None:
        workspace_bytes = CPU_WORKSPACE_BYTES if device.type == "cpu" else GPU_WORKSPACE_BYTES
    return max(1, workspace_bytes // (bytes_per_element * max(1, length)))


def even_size(count: int, limit: int) -> int:
    """The size of as few parts of ``count`` as a limit allows, all of about one size; whole tiles where they fit."""
    parts = -(-count // limit)
    size = -(-count // max(1, parts))
    whole_tiles = -(-size // TILE) * TILE
    return max(1, min(count, whole_tiles if whole_tiles <= limit else size))


def row_spans(rows: Tensor, n: int, limit: int) -> Iterator[Tensor | slice]:
    """Sorted ``rows`` of ``n`` in parts of at most ``limit``: indices, or slices where they are all rows."""
    size = even_size(len(rows), limit)
    for start in range(0, len(rows), size):
        part = slice(start, min(start + size, len(rows)))
        yield part if len(rows) == n else rows[part]


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions) -> Tensor:
    """Float32 z of these rows and this slice of the vocabulary; the product is first stored in ``logits_dtype``."""
    z = mm_f32(hidden, weight.t())
    if options.logits_dtype != torch.float32:
        z = z.to(options.logits_dtype).float()
    if bias is not None:
        z.add_(bias)
    if options.softcap is not None:
        z.div_(options.softcap).tanh_().mul_(options.softcap)
    return z.div_(options.temperature)


def subtract_max_(z: Tensor, row_max: Tensor) -> Tensor:
    """Make z - max z of z; a token that a bias of -inf bans stays finite."""
    return z.sub_(row_max[:, None]).clamp_min_(LOWEST)


def row_stats_(z: Tensor, target: Tensor, *, entropy: bool) -> RowStats:
    """The statistics of whole rows of logits, which become z - max z.

    Target logit and normaliser come from the same z and the sum holds exp(0) = 1, so no log-prob is above 0.
    """
    row_max = z.amax(dim=1)
    target_logit = z.gather(1, target[:, None]).squeeze(1) - row_max
    subtract_max_(z, row_max)
    exp = z.exp()
    total = exp.sum(dim=1)
    log_sum = total.log()
    return RowStats(
        logprob=target_logit - log_sum,
        entropy=log_sum - exp.mul_(z).sum(dim=1) / total if entropy else log_sum.new_empty(0),
        row_max=row_max,
        log_sum=log_sum,
    )


def product_gradient_(
    z: Tensor,
    target: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    options: HeadOptions,
    *,
    first_column: int = 0,
) -> Tensor:
    """The gradient with respect to hidden weight^T + bias, given z - max z and those of log-prob and entropy.

    With log p = z - max z - log_sum:  d logprob / d z_j = [j is the target] - p_j,  d H / d z_j = -p_j (log p_j + H).
    ``entropy`` is read with ``grad_entropy`` only. ``z`` holds the columns of the vocabulary from ``first_column`` on,
    and is overwritten.
    """
    p = (z - log_sum[:, None]).exp_()
    slope = None
    if options.softcap is not None:  # 1 - tanh^2, with tanh recovered from z
        tanh = z.add(row_max[:, None]).mul_(options.temperature / options.softcap)
        slope = tanh.square_().neg_().add_(1.0)
    grad_logprob = grad_logprob / options.temperature
    if grad_entropy is None:
        grad = p.mul_(-grad_logprob[:, None])
    else:
        grad = z.add_((entropy - log_sum)[:, None])
        grad.mul_(-grad_entropy[:, None] / options.temperature).sub_(grad_logprob[:, None]).mul_(p)
    column = target - first_column
    inside = (column >= 0) & (column < z.shape[1])
    at_target = torch.arange(len(target), device=target.device), column.where(inside, 0)
    grad[at_target] += grad_logprob.where(inside, 0.0)
    return grad if slope is None else grad.mul_(slope)
