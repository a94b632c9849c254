"""The Triton kernels: statistics of whole rows of logits, and the gradient of a slice of the vocabulary."""

from __future__ import annotations

import triton
import triton.language as tl

from asyppo_kernels._policy_head_kernels import row_statistics, write_gradient


@triton.jit(do_not_specialize=["first_row"])
def statistics_kernel(
    z_ptr,  # [programs, pitch]
    index_ptr,  # [programs] int64: the row of each program; None: first_row and on
    target_ptr,  # [N] int64, as the outputs
    bias_ptr,
    logprob_ptr,
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    first_row,
    n_columns,
    pitch,
    inv_temperature,
    softcap,
    inv_softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log-prob, entropy, maximum and log sum exp(z - max) of a row a program; entropy_ptr None leaves that out."""
    program = tl.program_id(0).to(tl.int64)
    row = first_row + program
    if index_ptr is not None:
        row = tl.load(index_ptr + program)
    logprob, entropy, row_max, log_sum = row_statistics(
        z_ptr + program * pitch,
        bias_ptr,
        tl.load(target_ptr + row),
        n_columns,
        pitch,
        inv_temperature,
        softcap,
        inv_softcap,
        ENTROPY=entropy_ptr is not None,
        SOFTCAP=SOFTCAP,
        BLOCK=BLOCK,
    )
    tl.store(logprob_ptr + row, logprob)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)


@triton.jit(do_not_specialize=["first_column"])
def gradient_kernel(
    z_ptr,  # [programs, pitch]: columns first_column and on of the rows
    grad_ptr,  # [programs, grad_pitch], over z or elsewhere
    index_ptr,  # [programs] int64: the row of each program
    target_ptr,  # [N] int64, as all numbers of a row
    bias_ptr,  # of the slice
    entropy_ptr,
    row_max_ptr,
    log_sum_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,  # None: zero, and the entropy is not read
    first_column,
    n_columns,
    pitch,
    grad_pitch,
    inv_temperature,
    softcap,
    inv_softcap,
    SOFTCAP: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient with respect to the products of a slice of the vocabulary, a row a program."""
    program = tl.program_id(0).to(tl.int64)
    row = tl.load(index_ptr + program)
    entropy = 0.0
    grad_entropy = 0.0
    if grad_entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + row)
        grad_entropy = tl.load(grad_entropy_ptr + row)
    write_gradient(
        z_ptr + program * pitch,
        grad_ptr + program * grad_pitch,
        bias_ptr,
        tl.load(target_ptr + row) - first_column,
        n_columns,
        pitch,
        tl.load(row_max_ptr + row),
        tl.load(log_sum_ptr + row),
        entropy,
        tl.load(grad_logprob_ptr + row),
        grad_entropy,
        inv_temperature,
        softcap,
        inv_softcap,
        SOFTCAP=SOFTCAP,
        OVERLAPS=OVERLAPS,
        BLOCK=BLOCK,
    )
