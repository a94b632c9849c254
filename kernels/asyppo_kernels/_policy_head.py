"""What the two policy-head ops share: logits of some rows, their statistics, and the gradient of those statistics.

The functions work in place on one float32 block of logits [n, V], which are in base 2: z times log2 e, since exp2 takes
less time than exp, and the factor none in the product. On a CPU they pass over the block in tiles that its cache holds,
and a chunk of rows costs that one block; on a GPU it costs ``BLOCKS`` such blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from asyppo_kernels._args import FLOATS, check_number, check_tensor
from asyppo_kernels._gemm import mm_f32

IGNORE_TARGET = -100
TILE = 128  # rows or columns of a tile of a matrix product
BLOCKS = 3  # float32 blocks of logits alive at once below on a GPU: z, p, and the slope of the softcap
GPU_WORKSPACE_BYTES = 5 * 2**29  # 2.5 GiB
CPU_ROWS = 256, 1024  # every chunk of rows reads the whole weight, so that few at a time are slow: the first, and more
CPU_MORE_BYTES = 2**27  # as long as they take this, but at least
CPU_LEAST_BYTES = 2**25
CPU_WORKSPACE_BYTES = 2**28  # and never more than this
CPU_SLICE_BYTES = 2**25  # slices of the vocabulary read the weight once, however many
CPU_TILE_BYTES = 2**20  # a thread's part of the logits between whose passes the cache keeps it
KEPT_LOGITS_BYTES = 2**26  # a CPU keeps logits of at most this for the backward, which then has a product less
LOG2_E, LN_2 = math.log2(math.e), math.log(2)
LOWEST = -1e20  # stands in for a logit of -inf: exp of both is 0, but 0 * -inf is NaN


class HeadOptions(NamedTuple):
    """How hidden becomes logits: z = softcap(hidden weight^T + bias) / temperature."""

    temperature: float
    softcap: float | None
    logits_dtype: torch.dtype

    @property
    def unit(self) -> float:
        """What products and bias are multiplied by: they are then the argument of tanh, or logits in base 2."""
        return LOG2_E / self.temperature if self.softcap is None else 1 / self.softcap


class RowStats(NamedTuple):
    """Of each row of logits: the target's log-prob, the entropy, the maximum, and log sum exp(z - max)."""

    logprob: Tensor
    entropy: Tensor  # empty if not asked for
    row_max: Tensor  # in the base of z
    log_sum: Tensor


def check_policy_head(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logits_dtype: torch.dtype,
    compute_dtype: torch.dtype | None,
) -> torch.dtype:
    """The dtype of the products; ValueError, naming the argument, unless these describe a policy head and its targets.

    With a ``compute_dtype``, hidden and weight may each be of that dtype or float32; without one they are of one dtype.
    """
    if compute_dtype is not None and compute_dtype not in FLOATS:
        raise ValueError(
            f"compute_dtype: got {compute_dtype!r}, needs {' or '.join(str(dtype) for dtype in FLOATS)}, or None"
        )
    given = FLOATS if compute_dtype is None else tuple({compute_dtype: None, torch.float32: None})
    check_tensor("hidden", hidden, shape=[None, None], needs="[N, H]", dtypes=given)
    n, h = hidden.shape
    device = hidden.device
    given = (hidden.dtype,) if compute_dtype is None else given
    check_tensor("weight", weight, shape=[None, h], needs=f"[V, H] = [V, {h}]", dtypes=given, device=device)
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
    return hidden.dtype if compute_dtype is None else compute_dtype


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
    bytes_per_element: int | None = None,
) -> int:
    """How many rows of ``length`` logits (or columns of ``length`` rows) fit the workspace; at least one.

    An element takes ``bytes_per_element``; None is what the functions below take on this device. A workspace of None is
    2.5 GiB, and on a CPU what 1024 rows take, from 32 to 128 MiB, or 256 rows, up to 256 MiB.
    """
    cpu = device.type == "cpu"
    if bytes_per_element is None:
        bytes_per_element = 4 if cpu else 4 * BLOCKS
    if workspace_bytes is None:
        fewest, more = (rows * bytes_per_element * length for rows in CPU_ROWS)
        full = max(CPU_LEAST_BYTES, min(CPU_MORE_BYTES, more), fewest)
        workspace_bytes = min(CPU_WORKSPACE_BYTES, full) if cpu else GPU_WORKSPACE_BYTES
    return max(1, workspace_bytes // (bytes_per_element * max(1, length)))


def slice_bytes(device: torch.device) -> int | None:
    """The workspace for slices of the vocabulary: a CPU wins nothing by large ones."""
    return min(CPU_SLICE_BYTES, CPU_WORKSPACE_BYTES) if device.type == "cpu" else None


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


def tiles(z: Tensor) -> Iterator[slice]:
    """The rows of a block of logits in parts that a CPU's cache holds through many passes; on a GPU in one part."""
    n, length = z.shape
    size = n
    if z.device.type == "cpu":
        size = max(1, CPU_TILE_BYTES * torch.get_num_threads() // (4 * max(1, length)))
    yield from (slice(start, min(start + size, n)) for start in range(0, n, size))


def products(hidden: Tensor, weight: Tensor, options: HeadOptions, out: Tensor | None = None) -> Tensor:
    """Float32 hidden weight^T of these rows and this slice of the vocabulary, as stored in ``logits_dtype``, in the
    unit of ``options``; of float32 operands in the first rows of ``out``, if given."""
    if options.logits_dtype == torch.float32:
        out = None if out is None else out[: len(hidden)]
        return mm_f32(hidden, weight.t(), scale=options.unit, out=out)
    return mm_f32(hidden, weight.t()).to(options.logits_dtype).float().mul_(options.unit)


def bias_in(bias: Tensor | None, options: HeadOptions) -> Tensor | None:
    """Float32 ``bias`` in the unit of ``options``."""
    return None if bias is None else bias.float() * options.unit


def logits_(z: Tensor, bias: Tensor | None, options: HeadOptions) -> Tensor:
    """Make logits in base 2 of products, given ``bias_in``."""
    if bias is not None:
        z.add_(bias)
    if options.softcap is not None:
        z.tanh_().mul_(options.softcap * LOG2_E / options.temperature)
    return z


def subtract_max_(z: Tensor, row_max: Tensor, bias: Tensor | None) -> Tensor:
    """Make z - max z of z; a token that a bias of -inf bans stays finite."""
    z.sub_(row_max[:, None])
    return z if bias is None else z.clamp_min_(LOWEST)


def leaves_exp(options: HeadOptions, *, entropy: bool) -> bool:
    """Whether ``row_stats_`` leaves exp(z - max z), all that a gradient then needs, in place of z - max z."""
    return not entropy and options.softcap is None


def row_stats_(z: Tensor, target: Tensor, bias: Tensor | None, options: HeadOptions, *, entropy: bool) -> RowStats:
    """The statistics of whole rows of products, which become z - max z, or exp of that: see ``leaves_exp``.

    Target logit and normaliser come from the same z and the sum holds exp(0) = 1, so no log-prob is above 0.
    """
    logprob, row_max, log_sum = (z.new_empty(len(z)) for _ in range(3))
    row_entropy = z.new_empty(len(z) if entropy else 0)
    bias = bias_in(bias, options)
    in_place = leaves_exp(options, entropy=entropy)
    for rows in tiles(z):
        tile = logits_(z[rows], bias, options)
        row_max[rows] = peak = tile.amax(dim=1)
        target_logit = tile.gather(1, target[rows, None]).squeeze(1) - peak
        subtract_max_(tile, peak, bias)
        exp = tile.exp2_() if in_place else tile.exp2()
        total = exp.sum(dim=1)
        log_sum[rows] = log_total = total.log()
        logprob[rows] = LN_2 * target_logit - log_total
        if entropy:
            row_entropy[rows] = log_total - exp.mul_(tile).sum(dim=1) * LN_2 / total
    return RowStats(logprob, row_entropy, row_max, log_sum)


def product_gradient(
    z: Tensor,
    target: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    options: HeadOptions,
    *,
    out: Tensor,
    first_column: int = 0,
    is_exp: bool = False,
) -> Tensor:
    """The gradient with respect to hidden weight^T + bias, given z - max z and those of log-prob and entropy.

    With log p = z - max z - log_sum:  d logprob / d z_j = [j is the target] - p_j,  d H / d z_j = -p_j (log p_j + H).
    ``entropy`` is read with ``grad_entropy`` only. ``z`` holds the columns of the vocabulary from ``first_column`` on;
    with ``is_exp`` it is exp(z - max z). The result is ``out``, which may be ``z`` itself.
    """
    grad_logprob = grad_logprob / options.temperature
    # With e = exp(z - max z), the gradient is e (slope z + constant) off the target: two passes and an exponential.
    total = log_sum.exp()
    constant = -grad_logprob / total
    slope_of_z = None
    if grad_entropy is not None:
        slope_of_z = -grad_entropy / (options.temperature * total)
        constant = constant + (entropy - log_sum) * slope_of_z
        slope_of_z = slope_of_z * LN_2
    column = target - first_column
    inside = (column >= 0) & (column < z.shape[1])
    column, at_target = column.where(inside, 0), grad_logprob.where(inside, 0.0)
    for rows in tiles(z):
        tile, grad = z[rows], out[rows]
        slope = None
        if options.softcap is not None:  # 1 - tanh^2, with tanh recovered from z
            tanh = tile.add(row_max[rows, None]).mul_(options.temperature * LN_2 / options.softcap)
            slope = tanh.square_().neg_().add_(1.0)
        exp = tile if is_exp else tile.exp2()
        if slope_of_z is None:
            torch.mul(exp, constant[rows, None], out=grad)
        else:
            torch.mul(tile, slope_of_z[rows, None], out=grad).add_(constant[rows, None]).mul_(exp)
        grad.scatter_add_(1, column[rows, None], at_target[rows, None])
        if slope is not None:
            grad.mul_(slope)
    return out
