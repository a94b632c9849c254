"""The public function ``stacked_rms_norm``: checks, dispatch, registration and autograd."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from asyppo_kernels._args import FLOATS, Backend, check_number, check_tensor, choose_backend
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
    choose_backend("stacked_rms_norm", backend, x.device, has_triton=False)
    return StackedRMSNorm(*torch_form.rms_norm(x, weight, residual, eps))
