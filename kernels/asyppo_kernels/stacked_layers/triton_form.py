"""The stacked layers by Triton kernels: one launch forward; one backward, and one more for the gradients of weights.

A weight's gradient is a sum over all rows of its critic. The rows are cut into parts, one program each, and a second
launch adds the parts: no float atomics, and the cut depends on the shape alone, so a result repeats to the bit on any
device. Inputs are read by their strides, outputs are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyppo_kernels._args import cdiv, device_guard, next_power_of_2
from asyppo_kernels.stacked_layers import kernels

TILE = 2048  # elements that a program has in flight of each tensor
PROGRAMS = 1024  # about what the rows are cut for where a weight needs its gradient: eight programs a multiprocessor


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return normed and summed [M, N, H]; without a residual summed is empty."""
    m, n, h = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    summed = x.new_empty(0 if residual is None else x.shape, dtype=dtype)
    normed = x.new_empty(x.shape, dtype=torch.promote_types(weight.dtype, dtype))
    rows, block_h, num_warps = _row_tile(n, h)
    if n:
        with device_guard(x):
            kernels.rms_norm_kernel[(cdiv(n, rows), m)](
                x,
                residual,
                weight,
                normed,
                None if residual is None else summed,
                n,
                h,
                eps,
                *x.stride(),
                *_strides(residual, 3),
                *weight.stride(),
                ROWS=rows,
                BLOCK_H=block_h,
                num_warps=num_warps,
            )
    return normed, summed


def rms_norm_backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    eps: float,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of summed and weight; one that is not needed is empty."""
    m, n, h = summed.shape
    grad_input = summed.new_empty(summed.shape if needs_input else 0)
    grad_weight = weight.new_empty(weight.shape if needs_weight else 0)
    rows, block_h, num_warps = _row_tile(n, h)
    part_rows = _part(n, rows, m) if needs_weight else rows
    parts = cdiv(n, part_rows)
    partial = weight.new_empty((parts, m, h), dtype=torch.float32) if needs_weight else None
    with device_guard(summed):
        if n:
            kernels.rms_norm_backward_kernel[(parts, m)](
                grad_normed,
                grad_summed,
                summed,
                weight,
                grad_input if needs_input else None,
                partial,
                n,
                h,
                eps,
                part_rows,
                *grad_normed.stride(),
                *_strides(grad_summed, 3),
                *summed.stride(),
                *weight.stride(),
                ROWS=rows,
                BLOCK_H=block_h,
                num_warps=num_warps,
            )
        if partial is not None:
            _add_parts(partial[None], [grad_weight])
    return grad_input, grad_weight


def qk_norm_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the rotated q [M, N, Hq, D] and k [M, N, Hk, D]."""
    m, n, q_heads, d = q.shape
    k_heads = k.shape[2]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if n:
        with device_guard(q):
            kernels.qk_norm_rope_kernel[(n, m)](
                q,
                k,
                cos,
                sin,
                q_weight,
                k_weight,
                q_out,
                k_out,
                n,
                q_heads,
                k_heads,
                d // 2,
                eps,
                *q.stride(),
                *k.stride(),
                *_angle_strides(cos),
                *_angle_strides(sin),
                *_strides(q_weight, 2),
                *_strides(k_weight, 2),
                **_head_tile(q_heads, k_heads, d),
            )
    return q_out, k_out


def qk_norm_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and the weights; those of weights that are not there or not needed are empty."""
    m, n, q_heads, d = grad_q.shape
    k_heads = grad_k.shape[2]
    q_out, k_out = grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)
    grad_weights = [
        cos.new_empty(0) if w is None else w.new_empty(w.shape if needs_weights else 0) for w in (q_weight, k_weight)
    ]
    wanted = [g for g in grad_weights if g.numel()]
    part_tokens = _part(n, 1, m) if wanted else 1
    parts = cdiv(n, part_tokens)
    partial = cos.new_empty((len(wanted), parts, m, d), dtype=torch.float32)
    lines = iter(partial)
    with device_guard(grad_q):
        if n:
            kernels.qk_norm_rope_backward_kernel[(parts, m)](
                grad_q,
                grad_k,
                q,
                k,
                cos,
                sin,
                q_weight,
                k_weight,
                q_out,
                k_out,
                *(next(lines) if g.numel() else None for g in grad_weights),
                n,
                q_heads,
                k_heads,
                d // 2,
                eps,
                part_tokens,
                *grad_q.stride(),
                *grad_k.stride(),
                *_strides(q, 4),
                *_strides(k, 4),
                *_angle_strides(cos),
                *_angle_strides(sin),
                *_strides(q_weight, 2),
                *_strides(k_weight, 2),
                **_head_tile(q_heads, k_heads, d),
            )
        if wanted:
            _add_parts(partial, wanted)
    return q_out, k_out, grad_weights[0], grad_weights[1]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up [M, N, I]."""
    m, n, width = gate.shape
    out = gate.new_empty(gate.shape)
    rows, block = _element_tile(n, width)
    if n:
        with device_guard(gate):
            kernels.swiglu_kernel[(cdiv(n, rows) * cdiv(width, block), m)](
                gate, up, out, n, width, *gate.stride(), *up.stride(), ROWS=rows, BLOCK=block
            )
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up [M, N, I]."""
    m, n, width = gate.shape
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    rows, block = _element_tile(n, width)
    if n:
        with device_guard(gate):
            kernels.swiglu_backward_kernel[(cdiv(n, rows) * cdiv(width, block), m)](
                grad,
                gate,
                up,
                grad_gate,
                grad_up,
                n,
                width,
                *grad.stride(),
                *gate.stride(),
                *up.stride(),
                ROWS=rows,
                BLOCK=block,
            )
    return grad_gate, grad_up


def embedding(tokens: Tensor, weight: Tensor, inputs: Tensor, projection: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [M, N, H] in ``dtype``."""
    (m, features, h), n = projection.shape, tokens.shape[1]
    out = projection.new_empty((m, n, h), dtype=dtype)
    rows, block = _element_tile(n, h)
    if n:
        with device_guard(out):
            kernels.embedding_kernel[(cdiv(n, rows) * cdiv(h, block), m)](
                tokens,
                weight,
                inputs,
                projection,
                out,
                n,
                h,
                *_shared_strides(tokens),
                *_shared_strides(weight),
                *_shared_strides(inputs),
                *projection.stride(),
                FEATURES=features,
                ROWS=rows,
                BLOCK=block,
            )
    return out


def embedding_backward(grad: Tensor, inputs: Tensor, projection: Tensor) -> Tensor:
    """Return the gradient of the projection [M, F, H]."""
    (m, features, h), n = projection.shape, grad.shape[1]
    grad_projection = projection.new_empty(projection.shape)
    rows, block = _element_tile(n, h)
    slices = cdiv(h, block)
    part_rows = _part(n, rows, m * slices)
    parts = cdiv(n, part_rows)
    partial = grad.new_empty((parts, m, features, h), dtype=torch.float32)
    with device_guard(grad):
        if n:
            kernels.embedding_backward_kernel[(parts * slices, m)](
                grad,
                inputs,
                partial,
                n,
                h,
                features,
                part_rows,
                *grad.stride(),
                *_shared_strides(inputs),
                FEATURES=next_power_of_2(features),
                ROWS=rows,
                BLOCK=block,
            )
        _add_parts(partial[None], [grad_projection])
    return grad_projection


def _row_tile(n: int, h: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program that holds whole rows: 16 elements a thread, for rows up to 8192 long."""
    block_h = next_power_of_2(h)
    rows = min(max(1, TILE // block_h), next_power_of_2(max(n, 1)))
    return rows, block_h, min(16, max(4, rows * block_h // 512))  # 16 warps are 1,024 threads on AMD


def _head_tile(q_heads: int, k_heads: int, d: int) -> dict[str, int]:
    """The heads of one token that a program holds at a time."""
    half = next_power_of_2(d // 2)
    most = max(1, TILE // half // 2)
    return {
        "Q_HEADS": min(most, next_power_of_2(q_heads)),
        "K_HEADS": min(most, next_power_of_2(k_heads)),
        "HALF": half,
    }


def _element_tile(n: int, width: int) -> tuple[int, int]:
    """(rows, columns) of a program of elementwise work."""
    block = min(TILE // 2, next_power_of_2(width))  # 3072 and 4864 are nearer to its multiples than to TILE's
    return min(TILE // block, next_power_of_2(max(n, 1))), block


def _part(n: int, rows: int, m: int) -> int:
    """Rows of a part: a multiple of ``rows``, such that M critics have about PROGRAMS parts."""
    return rows * max(1, cdiv(n, rows * max(1, PROGRAMS // m)))


def _add_parts(partial: Tensor, outs: list[Tensor]) -> None:
    """Add ``partial`` [weights, parts, M, columns] over the parts into the weights' gradients [M, columns]."""
    weights, parts = partial.shape[:2]
    columns = outs[0].numel()
    block = min(32, next_power_of_2(columns))
    kernels.add_parts_kernel[(cdiv(columns, block), weights)](
        partial,
        outs[0],
        outs[1] if weights == 2 else None,
        parts,
        columns,
        BLOCK_P=min(64, next_power_of_2(max(parts, 1))),
        BLOCK_C=block,
    )


def _strides(x: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions if x is None else x.stride()


def _angle_strides(x: Tensor) -> tuple[int, ...]:
    """Of a cosine or sine [M, N, D], or [N, D] for all critics."""
    return x.stride() if x.dim() == 3 else (0, *x.stride())


def _shared_strides(x: Tensor) -> tuple[int, ...]:
    """Of a tensor [M, ...], or [1, ...] for all critics."""
    return (0, *x.stride()[1:]) if len(x) == 1 else x.stride()
