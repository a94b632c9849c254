"""``ensemble_gae`` by Triton kernels: one launch, or two where a few long rows would leave the device idle.

A row is one program's, which walks it in blocks from the right and carries the next valid step's mean and advantages
from block to block; short rows share a program. A few long rows are cut into chunks: a first launch reduces each chunk
but a row's first to what it does to the steps before it, and the second starts every chunk from the summaries of those
to its right. That reads value, reward and mask twice, the second time from the cache. Which way is taken depends on the
shape alone.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from asyppo_kernels._args import device_guard
from asyppo_kernels.ensemble_gae import kernels

LANES = 64 if torch.version.hip else 32  # of the one warp that a program has: no barrier, and no exchange but its own
BLOCK = kernels.GROUP.value * LANES  # steps that a program holds at once, of one row or of several short ones
LEAST_CHUNK = 1024  # in steps, a multiple of a block
FEW_ROWS = 64
PROGRAMS = 256  # about what a few long rows are cut for
MOST_CHUNKS = 64


def chunks_of(b: int, t: int) -> int:
    """How many programs share a row."""
    pieces = triton.cdiv(t, LEAST_CHUNK)
    if b > FEW_ROWS or pieces < 4:
        return 1
    span = triton.cdiv(pieces, min(pieces, MOST_CHUNKS, PROGRAMS // max(b, 1)))  # in pieces
    return triton.cdiv(pieces, span)


def forward(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    value_lam: float,
    row_lam: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return advantage, returns, mean and std, all [B, T] float32."""
    k, b, t = value.shape
    advantage = value.new_empty((b, t), dtype=torch.float32)
    outputs = advantage, torch.empty_like(advantage), torch.empty_like(advantage), torch.empty_like(advantage)
    if b * t == 0:
        return outputs
    block = max(kernels.GROUP.value, min(BLOCK, triton.next_power_of_2(t)))
    rows = min(max(1, BLOCK // block), triton.next_power_of_2(b))
    chunks = chunks_of(b, t)
    span = LEAST_CHUNK * triton.cdiv(triton.cdiv(t, LEAST_CHUNK), chunks)
    strides = (*value.stride(), *reward.stride(), *mask.stride())
    numbers = (gamma, gamma * lam, gamma * value_lam)
    inputs = (value, reward, mask.view(torch.uint8), None if row_lam is None else row_lam.contiguous())
    summary = value.new_empty((b, chunks, 7), dtype=torch.float32) if chunks > 1 else None
    with device_guard(value):
        if chunks > 1:
            kernels.summary_kernel[(b * (chunks - 1),)](
                *inputs, summary, b, t, span, *strides, *numbers, M=k, BLOCK_T=block, num_warps=1
            )
        kernels.gae_kernel[(triton.cdiv(b, rows) * chunks,)](
            *inputs,
            summary,
            *outputs,
            b,
            t,
            span,
            chunks,
            *strides,
            *numbers,
            M=k,
            ROWS=rows,
            BLOCK_T=block,
            BLOCK_CHUNKS=triton.next_power_of_2(chunks),
            num_warps=1,
        )
    return outputs
