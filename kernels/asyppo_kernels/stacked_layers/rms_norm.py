"""The public function ``stacked_rms_norm``: checks, dispatch, registration and autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from asyppo_kernels._args import FLOATS, Backend, check_number, check_tensor, choose_backend
from asyppo_kernels._registration import Op
from asyppo_kernels.stacked_layers import torch_form


class StackedRMSNorm(NamedTuple):
    """What ``stacked_rms_norm`` returns; both differentiable."""

    normed: Tensor
    """[M, N, H], the input of the next layer."""
    summed: Tensor
    """[M, N, H], x + residual: the residual of the next norm. ``x`` itself if there is no residual."""


def stacked_rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None, backend: Backend = "auto"
) -> StackedRMSNorm:
    """Add the residual and normalise by the root mean square, each of M critics with its own weight.

    ``summed = x + residual`` and ``normed[m] = weight[m] * summed[m] / sqrt(mean(summed[m]²) + eps)`` (Zhang &
    Sennrich, arXiv 1910.07467). Sums are rounded to summed's dtype before the statistics, which are float32, and the
    normalised row is rounded to that dtype before the product with weight: where transformers' LlamaRMSNorm and
    Qwen3RMSNorm round, and what they give.

    Args:
        x: [M, N, H] float32, bfloat16 or float16; any strides.
        weight: [M, H], in any of these dtypes.
        eps: added to the mean square, >= 0.
        residual: [M, N, H], in any of these dtypes, or None.
        backend: "torch", "triton" (a GPU's, but for Triton's interpreter), or "auto": Triton on a GPU, torch elsewhere.

    Returns:
        ``StackedRMSNorm(normed, summed)``, both [M, N, H] and differentiable in x, residual and weight, for upstream
        gradients of either or both. dtypes promote as torch's do: summed has that of ``x + residual``, normed that of
        ``weight * summed``. Without a residual, summed is ``x`` itself. Gradients come in the dtype of the input;
        that of weight accumulates in float32.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, layout or value.
    """
    check_tensor("x", x, shape=(None, None, None), needs="[M, N, H]", dtypes=FLOATS)
    m, _, h = x.shape
    if m == 0 or h == 0:
        raise ValueError(f"x: got shape {list(x.shape)}, needs [M, N, H] with M >= 1 and H >= 1")
    check_tensor("weight", weight, shape=(m, h), needs=f"[M, H] = {[m, h]}", dtypes=FLOATS, device=x.device)
    if residual is not None:
        needs = f"[M, N, H] = {list(x.shape)}"
        check_tensor("residual", residual, shape=x.shape, needs=needs, dtypes=FLOATS, device=x.device)
    check_number("eps", eps, "a number >= 0", low=0.0)
    if choose_backend("stacked_rms_norm", backend, x.device, has_triton=True) == "torch":
        return StackedRMSNorm(*torch_form.rms_norm(x, weight, residual, eps))
    normed, summed = _forward_op(x, weight, residual, float(eps))
    return StackedRMSNorm(normed, x if residual is None else summed)


def forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, summed); without a residual summed is empty."""
    from asyppo_kernels.stacked_layers import triton_form  # when it is used: not every platform has Triton

    return triton_form.rms_norm(x, weight, residual, eps)


_forward_op = Op("asyppo::stacked_rms_norm", forward)


@_forward_op.register_fake
def _(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    normed = x.new_empty(x.shape, dtype=torch.promote_types(weight.dtype, dtype))
    return normed, x.new_empty(0 if residual is None else x.shape, dtype=dtype)


def backward(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    eps: float,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of summed and weight, empty where not needed."""
    from asyppo_kernels.stacked_layers import triton_form

    return triton_form.rms_norm_backward(grad_normed, grad_summed, summed, weight, eps, needs_input, needs_weight)


_backward_op = Op("asyppo::stacked_rms_norm_backward", backward)


@_backward_op.register_fake
def _(
    grad_normed: Tensor,
    grad_summed: Tensor | None,
    summed: Tensor,
    weight: Tensor,
    eps: float,
    needs_input: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        summed.new_empty(summed.shape if needs_input else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, residual, ctx.eps = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.set_materialize_grads(False)  # the last norm's summed has no gradient: then none is read


def _backward(ctx: Any, grad_normed: Tensor | None, grad_summed: Tensor | None) -> tuple[Tensor | None, ...]:
    summed, weight = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.dtypes
    needs_x, needs_weight, needs_residual, _ = ctx.needs_input_grad
    if residual_dtype is None:
        grad_summed = None  # of the empty tensor
    grad: Tensor | None = grad_summed
    grad_weight = None
    if grad_normed is not None:
        grad, grad_weight = _backward_op(
            grad_normed, grad_summed, summed, weight, ctx.eps, needs_x or needs_residual, needs_weight
        )
    return (
        grad.to(x_dtype) if needs_x and grad is not None else None,
        grad_weight if needs_weight else None,
        grad.to(residual_dtype) if needs_residual and grad is not None else None,
        None,  # of eps
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)
