"""Matrix products of low-precision operands, accumulated and returned in float32.

``torch.mm(out_dtype=)`` exists on CUDA only, so on other devices the operands are upcast first. Upcast once, outside
the loop over chunks: that is what ``operand`` and ``gradient_operand`` are for.
"""

from __future__ import annotations

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


def mm_f32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two operands of one dtype, in float32."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32)


def addmm_f32_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` for a float32 ``total``."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
