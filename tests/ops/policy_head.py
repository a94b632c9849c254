"""What tests of both ops of the policy head share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from asyppo_kernels._args import INTERPRETED

BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD = ("hidden", "weight", "bias")
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


def doubled(data: dict[str, Any], compute_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same numbers in float64, for the oracle and for gradients that nothing rounds; hidden and weight as the
    products take them."""
    rounded = {name: data[name].to(compute_dtype) for name in ("hidden", "weight") if compute_dtype is not None}
    return {
        name: rounded.get(name, x).detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in data.items()
    }


def leaves(data: dict[str, Any]) -> list[Tensor]:
    """What gets gradients, in the order hidden, weight, bias."""
    return [x for x in map(data.get, HEAD) if x is not None and x.requires_grad]


def logit_roundings(logit_gradients: list[Tensor], hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """What a bfloat16 gradient of the logits, which is what the Triton form's products take, can add to the errors of
    the gradients of hidden, weight and bias, in float64: a rounding of every term of their sums, which may cancel.
    ``logit_gradients`` has that of each row [V]."""
    terms = torch.stack(logit_gradients).abs() * ROUNDING[torch.bfloat16]
    return {"hidden": terms @ weight.abs(), "weight": terms.T @ hidden.abs(), "bias": terms.sum(dim=0)}
