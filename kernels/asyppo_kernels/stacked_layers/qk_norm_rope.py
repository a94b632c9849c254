"""The public function ``stacked_qk_norm_rope``: checks, dispatch, registration and autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from asyppo_kernels._args import FLOATS, Backend, check_number, check_tensor, choose_backend
from asyppo_kernels._registration import Op
from asyppo_kernels.stacked_layers import torch_form


def stacked_qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalise the heads of queries and keys of M critics (if there are weights), then rotate them by position.

    ``y = x`` or, with a weight, ``y[m] = weight[m] * x[m] / sqrt(mean over D(x[m]²) + eps)``, rounded as in
    ``stacked_rms_norm``; then ``y * cos + rotate_half(y) * sin``, where ``rotate_half((a, b)) = (-b, a)`` on D's halves
    (rotary embedding, arXiv 2104.09864, in transformers' layout). With weights Qwen3's, without them Llama's,
    Mistral's and Qwen2's.

    Args:
        q: [M, N, Hq, D] float32, bfloat16 or float16, D even; any strides, so parts of one projection need no copy.
        k: [M, N, Hk, D], of q's dtype.
        cos: [N, D], or [M, N, D] if each critic has tokens of its own; in any of these dtypes. No gradient. All of D is
            read, so its halves may differ.
        sin: of cos's shape and dtype.
        q_weight: [M, D], in any of these dtypes, or None for no norm of q.
        k_weight: [M, D], likewise for k.
        eps: added to the mean square, >= 0.
        backend: "torch", "triton" (a GPU's, but for Triton's interpreter), or "auto": Triton on a GPU, torch elsewhere.

    Returns:
        The rotated (q, k), of the shapes and the dtype of the inputs, differentiable in q, k and the weights.
        Gradients come in the dtype of the input; those of the weights accumulate in float32.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device, layout or value, or cos or sin requires a gradient.
    """
    check_tensor("q", q, shape=(None, None, None, None), needs="[M, N, Hq, D]", dtypes=FLOATS)
    m, n, heads, d = q.shape
    if m == 0 or heads == 0 or d == 0 or d % 2:
        raise ValueError(f"q: got shape {list(q.shape)}, needs [M, N, Hq, D] with M, Hq >= 1 and D even and >= 2")
    check_tensor("k", k, shape=(m, n, None, d), needs=f"[M, N, Hk, D] = [{m}, {n}, Hk, {d}]", dtypes=(q.dtype,))
    if k.shape[2] == 0:
        raise ValueError(f"k: got shape {list(k.shape)}, needs [M, N, Hk, D] with Hk >= 1")
    if k.device != q.device:
        raise ValueError(f"k: got device {k.device}, needs {q.device}, as the other arguments")
    shape = (m, n, d) if isinstance(cos, Tensor) and cos.dim() == 3 else (n, d)
    needs = f"[N, D] = {[n, d]} or [M, N, D] = {[m, n, d]}"
    check_tensor("cos", cos, shape=shape, needs=needs, dtypes=FLOATS, device=q.device)
    check_tensor("sin", sin, shape=shape, needs=f"{list(shape)}, as cos", dtypes=(cos.dtype,), device=q.device)
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.requires_grad:
            raise ValueError(f"{name}: got a tensor that requires a gradient, needs one that does not")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_tensor(name, weight, shape=(m, d), needs=f"[M, D] = {[m, d]}", dtypes=FLOATS, device=q.device)
    check_number("eps", eps, "a number >= 0", low=0.0)
    if choose_backend("stacked_qk_norm_rope", backend, q.device, has_triton=True) == "torch":
        return torch_form.qk_norm_rope(q, k, cos, sin, q_weight, k_weight, eps)
    return _forward_op(q, k, cos, sin, q_weight, k_weight, float(eps))


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    from asyppo_kernels.stacked_layers import triton_form  # when it is used: not every platform has Triton

    return triton_form.qk_norm_rope(q, k, cos, sin, q_weight, k_weight, eps)


_forward_op = Op("asyppo::stacked_qk_norm_rope", forward)


@_forward_op.register_fake
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def backward(
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
    """The gradients of q, k and the weights; those of weights that are not there or not needed are empty."""
    from asyppo_kernels.stacked_layers import triton_form

    return triton_form.qk_norm_rope_backward(grad_q, grad_k, q, k, cos, sin, q_weight, k_weight, eps, needs_weights)


_backward_op = Op("asyppo::stacked_qk_norm_rope_backward", backward)


@_backward_op.register_fake
def _(
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
    def weight_like(weight: Tensor | None) -> Tensor:
        return cos.new_empty(0) if weight is None else weight.new_empty(weight.shape if needs_weights else 0)

    return (
        grad_q.new_empty(grad_q.shape),
        grad_k.new_empty(grad_k.shape),
        weight_like(q_weight),
        weight_like(k_weight),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, cos, sin, q_weight, k_weight, ctx.eps = inputs
    # A rotation alone is undone without its input.
    q, k = None if q_weight is None else q, None if k_weight is None else k
    ctx.save_for_backward(q, k, cos, sin, q_weight, k_weight)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    need_q, need_k, _, _, need_q_weight, need_k_weight, _ = ctx.needs_input_grad
    grads = _backward_op(grad_q, grad_k, *ctx.saved_tensors, ctx.eps, need_q_weight or need_k_weight)
    d_q, d_k, d_q_weight, d_k_weight = (
        grad if need else None for grad, need in zip(grads, (need_q, need_k, need_q_weight, need_k_weight), strict=True)
    )
    return d_q, d_k, None, None, d_q_weight, d_k_weight, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)
