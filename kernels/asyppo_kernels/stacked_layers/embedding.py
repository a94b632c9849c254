"""The public function ``stacked_embedding``: checks, dispatch, registration and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asyppo_kernels._args import FLOATS, Backend, check_tensor, choose_backend
from asyppo_kernels._registration import Op
from asyppo_kernels.stacked_layers import torch_form


def stacked_embedding(
    tokens: Tensor,
    weight: Tensor,
    inputs: Tensor,
    projection: Tensor,
    *,
    padding_idx: int | None = None,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Embed the tokens of M critics and add, beside each, a projection of F numbers that belong to it.

    ``out[m, n] = weight[m, tokens[m, n]] + sum_f inputs[m, n, f] * projection[m, f]``, in float32, rounded once. With
    a projection of zeros that is the embedding, to the bit.

    Args:
        tokens: int64 [M, N], or [1, N] that all critics read; each in 0 ... V - 1, which is not checked.
        weight: [M, V, H], or [1, V, H] that all critics share; float32, bfloat16 or float16, any strides.
        inputs: float32 [M, N, F], or [1, N, F] for all critics; F of 1 to 16.
        projection: [M, F, H], in any of these dtypes.
        padding_idx: a token whose embedding gets no gradient, as ``torch.nn.Embedding`` has it; None: none.
        dtype: that of the result; None: weight's.
        backend: "torch", "triton" (a GPU's, but for Triton's interpreter), or "auto": Triton on a GPU, torch elsewhere.

    Returns:
        [M, N, H], differentiable in weight and projection: gradients come in their dtype, the projection's accumulates
        in float32. The embedding's is torch's own, by sorted tokens.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or layout, or inputs require a gradient.
    """
    check_tensor("projection", projection, shape=(None, None, None), needs="[M, F, H]", dtypes=FLOATS)
    m, features, h = projection.shape
    if m == 0 or not 1 <= features <= 16 or h == 0:
        raise ValueError(
            f"projection: got shape {list(projection.shape)}, needs [M, F, H] with M >= 1, F of 1 to 16 and H >= 1"
        )
    device = projection.device
    check_tensor("tokens", tokens, shape=(None, None), needs="[M, N] or [1, N]", dtypes=(torch.int64,), device=device)
    n = tokens.shape[1]
    check_tensor("weight", weight, shape=(None, None, h), needs=f"[M, V, {h}]", dtypes=FLOATS, device=device)
    needs = f"[M, N, F] = {[m, n, features]} or {[1, n, features]}"
    check_tensor("inputs", inputs, shape=(None, n, features), needs=needs, dtypes=(torch.float32,), device=device)
    for name, x in (("tokens", tokens), ("weight", weight), ("inputs", inputs)):
        if len(x) not in (1, m):
            raise ValueError(f"{name}: got shape {list(x.shape)}, needs a first axis of M = {m}, projection's, or of 1")
    if inputs.requires_grad:
        raise ValueError("inputs: got a tensor that requires a gradient, needs one that is detached: it gets none")
    size = weight.shape[1]
    if padding_idx is not None and not 0 <= padding_idx < size:
        raise ValueError(f"padding_idx: got {padding_idx}, needs None or a token in 0 ... {size - 1}")
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise ValueError(f"dtype: got {dtype}, needs {' or '.join(str(d) for d in FLOATS)}")
    if choose_backend("stacked_embedding", backend, device, has_triton=True) == "torch":
        return torch_form.embedding(tokens, weight, inputs, projection, padding_idx, dtype)
    return _forward_op(tokens, weight, inputs, projection, padding_idx, dtype)


def forward(
    tokens: Tensor, weight: Tensor, inputs: Tensor, projection: Tensor, padding_idx: int | None, dtype: torch.dtype
) -> Tensor:
    from asyppo_kernels.stacked_layers import triton_form  # when it is used: not every platform has Triton

    return triton_form.embedding(tokens, weight, inputs, projection, dtype)


_forward_op = Op("asyppo::stacked_embedding", forward)


@_forward_op.register_fake
def _(
    tokens: Tensor, weight: Tensor, inputs: Tensor, projection: Tensor, padding_idx: int | None, dtype: torch.dtype
) -> Tensor:
    return projection.new_empty((projection.shape[0], tokens.shape[1], projection.shape[2]), dtype=dtype)


def backward(grad: Tensor, inputs: Tensor, projection: Tensor) -> Tensor:
    """The gradient of the projection."""
    from asyppo_kernels.stacked_layers import triton_form

    return triton_form.embedding_backward(grad, inputs, projection)


_backward_op = Op("asyppo::stacked_embedding_backward", backward)


@_backward_op.register_fake
def _(grad: Tensor, inputs: Tensor, projection: Tensor) -> Tensor:
    return projection.new_empty(projection.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, read, projection, ctx.padding_idx, _ = inputs
    ctx.save_for_backward(tokens, read, projection)
    ctx.table = weight.shape[0], weight.shape[1], weight.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tokens, read, projection = ctx.saved_tensors
    needs = _forward_op.signature.named(ctx.needs_input_grad)
    tables, size, dtype = ctx.table
    gradients: dict[str, Tensor | None] = {}
    if needs["weight"]:
        gradients["weight"] = torch_form.embedding_weight_gradient(grad, tokens, tables, size, ctx.padding_idx, dtype)
    if needs["projection"]:
        gradients["projection"] = _backward_op(grad, read, projection)
    return _forward_op.signature.gradients(gradients)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
