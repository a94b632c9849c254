"""What tests of both ops of the policy head share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asyppo_kernels._args import INTERPRETED

BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}

# Which of hidden and weight are masters; float16 has nothing of its own but the dtype of its logits' gradient.
_MASTERS = [(torch.float32, torch.float32), (None, torch.float32), (torch.float32, None), (None, None)]
MASTERS = pytest.mark.parametrize(
    ("compute_dtype", "masters"),
    [
        (torch.float32, _MASTERS[0]),
        *((torch.bfloat16, masters) for masters in _MASTERS),
        *((torch.float16, masters) for masters in _MASTERS[:2]),
    ],
)


def skip_in_interpreter(backend: str) -> None:
    """Where there are tens of thousands of programs, each of which takes it milliseconds."""
    if backend == "triton" and INTERPRETED:
        pytest.skip("takes the interpreter minutes; runs on a GPU")


def error(got: Tensor, want: Tensor, floor: float = 1e-30) -> float:
    """The largest error, over the largest element (``floor``, if that is larger)."""
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=floor)).item()
