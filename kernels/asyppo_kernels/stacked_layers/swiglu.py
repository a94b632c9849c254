"""The public function ``stacked_swiglu``: checks, dispatch, registration and autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from asyppo_kernels._args import FLOATS, Backend, check_tensor, choose_backend
from asyppo_kernels._registration import Op
from asyppo_kernels.stacked_layers import torch_form


def stacked_swiglu(gate: Tensor, up: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return ``silu(gate) * up``, the gated activation of M critics' feed-forward layers (arXiv 2002.05202).

    ``silu(gate)`` is computed in float32 and rounded to gate's dtype before the product, as transformers'
    ``act_fn(gate) * up``.

    Args:
        gate: [M, N, I] float32, bfloat16 or float16; any strides: the halves ``both[..., :I]`` and ``both[..., I:]`` of
            one projection are read where they lie.
        up: [M, N, I], of gate's dtype.
        backend: "torch", "triton" (a GPU's, but for Triton's interpreter), or "auto": Triton on a GPU, torch elsewhere.

    Returns:
        [M, N, I] in gate's dtype, differentiable in gate and up. Only these two are kept for the backward.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or layout.
    """
    check_tensor("gate", gate, shape=(None, None, None), needs="[M, N, I]", dtypes=FLOATS)
    if gate.shape[0] == 0 or gate.shape[2] == 0:
        raise ValueError(f"gate: got shape {list(gate.shape)}, needs [M, N, I] with M >= 1 and I >= 1")
    needs = f"[M, N, I] = {list(gate.shape)}"
    check_tensor("up", up, shape=gate.shape, needs=needs, dtypes=(gate.dtype,), device=gate.device)
    if choose_backend("stacked_swiglu", backend, gate.device, has_triton=True) == "torch":
        return torch_form.swiglu(gate, up)
    return _forward_op(gate, up)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    from asyppo_kernels.stacked_layers import triton_form  # when it is used: not every platform has Triton

    return triton_form.swiglu(gate, up)


_forward_op = Op("asyppo::stacked_swiglu", forward)


@_forward_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    from asyppo_kernels.stacked_layers import triton_form

    return triton_form.swiglu_backward(grad, gate, up)


_backward_op = Op("asyppo::stacked_swiglu_backward", backward)


@_backward_op.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _backward_op(grad, *ctx.saved_tensors)
    return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=True))


_forward_op.register_autograd(_backward, setup_context=_setup_context)
