"""The public function ``ensemble_value``: checks, dispatch, registration and autograd."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from asyppo_kernels._args import FLOATS, Backend, check_tensor, choose_backend
from asyppo_kernels._registration import Op
from asyppo_kernels.ensemble_value.result import EnsembleValue


def ensemble_value(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> EnsembleValue:
    """Apply M critics' value heads and measure where the critics disagree.

    ``value[k, n] = hidden[k, n] · weight[k] + bias[k]``, with its mean and population standard deviation over k: the
    advantage's baseline and the signal of the masks in AsyPPO (arXiv 2510.01656). Products accumulate in float32.

    Args:
        hidden: [M, N, H] float32, bfloat16 or float16, the critics' last hidden states; M >= 1. Every row is read, so
            one that holds NaN makes weight's gradient NaN even where its own upstream gradient is 0.
        weight: [M, H], in any of these dtypes.
        bias: [M], in any of these dtypes.
        backend: "torch", "triton" (a GPU's, but for Triton's interpreter), or "auto": Triton on a GPU, torch elsewhere.

    Returns:
        ``EnsembleValue(value, mean, std)``, float32. ``value`` [M, N] is differentiable in hidden, weight and bias,
        whose gradients accumulate in float32 and come in the dtype of the input. ``mean`` and ``std`` [N] are detached.
        With one critic, and wherever the critics agree to the bit, std is exactly 0.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or layout.
    """
    check_tensor("hidden", hidden, shape=(None, None, None), needs="[M, N, H]", dtypes=FLOATS)
    k, _, h = hidden.shape
    if k == 0:
        raise ValueError(f"hidden: got shape {list(hidden.shape)}, needs [M, N, H] with M >= 1")
    check_tensor("weight", weight, shape=(k, h), needs="[M, H] of hidden", dtypes=FLOATS, device=hidden.device)
    if bias is not None:
        check_tensor("bias", bias, shape=(k,), needs="[M] of hidden", dtypes=FLOATS, device=hidden.device)
    form = choose_backend("ensemble_value", backend, hidden.device, has_triton=True)
    value, mean, std = _forward_op(hidden, weight, bias, form)
    return EnsembleValue(value, mean.detach(), std.detach())


def _form(form: str) -> ModuleType:
    """The module that computes; Triton is imported when it is used, since not every platform has it."""
    return importlib.import_module(f"asyppo_kernels.ensemble_value.{form}_form")


def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, form: str = "torch") -> tuple[Tensor, Tensor, Tensor]:
    return _form(form).forward(hidden, weight, bias)


_forward_op = Op("asyppo::ensemble_value", forward)


@_forward_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, form: str = "torch") -> tuple[Tensor, Tensor, Tensor]:
    k, n, _ = hidden.shape
    value = hidden.new_empty((k, n), dtype=torch.float32)
    return value, value.new_empty(n), value.new_empty(n)


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    form: str = "torch",
) -> tuple[Tensor, Tensor, Tensor]:
    return _form(form).backward(grad, hidden, weight, bias_dtype, (needs_hidden, needs_weight, needs_bias))


_backward_op = Op("asyppo::ensemble_value_backward", backward)


@_backward_op.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    form: str = "torch",
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        weight.new_empty(weight.shape) if needs_weight else weight.new_empty(0),
        grad.new_empty(grad.shape[0] if needs_bias else 0, dtype=bias_dtype),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ctx.form = inputs
    ctx.save_for_backward(hidden, weight)
    ctx.bias_dtype = torch.float32 if bias is None else bias.dtype
    ctx.set_materialize_grads(False)  # mean and std are detached: no zeros are made for them


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:  # of a caller of the op itself who uses no value
        return None, None, None, None
    hidden, weight = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    grad_hidden, grad_weight, grad_bias = _backward_op(
        grad, hidden, weight, ctx.bias_dtype, needs_hidden, needs_weight, needs_bias, ctx.form
    )
    return (
        grad_hidden if needs_hidden else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        None,  # of form
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)
