"""Matrix products of low-precision operands, accumulated and returned in float32.

``torch.mm(out_dtype=)`` exists on CUDA only, so on other devices the operands are upcast first. Upcast once, outside
the loop over chunks: that is what ``operand`` and ``gradient_operand`` are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def operand(x: Tensor) -> Tensor:
    """``x`` in the dtype it is multiplied in."""
    return x if x.is_cuda else x.float()


def gradient_operand(x: Tensor) -> Tensor:
    """``x`` in the dtype it is multiplied in against a gradient.

    float16 is upcast everywhere: a gradient of the logits is a probability times 1/batch, which float16 flushes to 0.
    """
    return x.float() if x.dtype == torch.float16 else operand(x)


def mm_f32(a: Tensor, b: Tensor, *, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """``scale * (a @ b)`` of two operands of one dtype, in float32; of float32 ones in ``out``, if given."""
    if a.dtype == torch.float32:
        nothing = a.new_empty(())
        return torch.mm(a, b, out=out) if scale == 1 else torch.addmm(nothing, a, b, beta=0, alpha=scale, out=out)
    product = torch.mm(a, b, out_dtype=torch.float32)
    return product if scale == 1 else product.mul_(scale)


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """``out = a @ b``, accumulated in float32 and rounded once to the dtype of ``out``."""
    if out.dtype == a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif a.is_cuda and out.dtype == a.dtype:
        with _partial_sums_in_float32():
            torch.mm(a, b, out=out)
    else:
        out.copy_(mm_f32(a, b))


@contextlib.contextmanager
def _partial_sums_in_float32() -> Iterator[None]:
    """Keep cuBLAS from adding up the parts of a split product in bfloat16, which it may by default.

    Whether it may split a product at all is the second half of the same setting, and stays as it is.
    """
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction
    split = matmul.allow_bf16_reduced_precision_reduction_split_k
    matmul.allow_bf16_reduced_precision_reduction = False, split
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = reduced, split


def accumulate_f32(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """``total = a @ b`` the first time, when ``total`` holds nothing yet, and ``total += a @ b`` after that."""
    if first:
        mm_into(total, a, b)
    else:
        addmm_f32_(total, a, b)


def addmm_f32_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` for a float32 ``total``."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
