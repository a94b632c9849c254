"""The public function, and the custom ops under it."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from asyppo_kernels._args import Backend, choose_backend
from asyppo_kernels._policy_head import KEPT_LOGITS_BYTES, HeadOptions, check_policy_head, gradient_buffers
from asyppo_kernels._registration import Op
from asyppo_kernels.linear_logprob.result import LinearLogprob

HEAD = ("hidden", "weight", "bias")  # what gets gradients


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
    logits_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> LinearLogprob:
    """Log-prob of each target token and entropy, from hidden states, without the logits [N, V] in memory.

    The logits are ``z = softcap(hidden weight^T + bias) / temperature`` with ``softcap(x) = c tanh(x / c)``, and both
    outputs belong to softmax(z). They are the log pi and H of AsyPPO's policy objective (arXiv 2510.01656): this is
    the op for the log-probs of the rollout and of a reference policy, and for a loss of your own.

    Differentiable in ``hidden``, ``weight`` and ``bias``, for any upstream gradient of both outputs; second
    derivatives are refused. The backward recomputes the logits, but on a CPU those of at most 64 MiB are kept for it
    where a gradient is needed. Gradients come in their input's dtype, accumulated in float32. Rows whose target
    is -100 cost nothing, are not read, and return 0; finding them is one host synchronisation. The op computes in
    ``compute_dtype``: ``torch.autocast`` neither casts its inputs nor reaches inside. Under ``torch.compile`` each new
    value of a number is a recompilation.

    Args:
        hidden: [N, H], float32, bfloat16 or float16: row t holds the hidden state that predicts target t.
        weight: [V, H], the dtype of hidden; with ``compute_dtype`` its own, see there.
        target: [N] int64: token in [0, V), or -100. Values are not checked.
        bias: [V], float32, bfloat16 or float16.
        temperature: above 0.
        softcap: c above 0, or None.
        entropy: False leaves the entropy out: the result holds None.
        logits_dtype: what the product hidden weight^T, accumulated in float32, is stored in. bfloat16 halves the
            traffic and moves a log-prob by up to 0.15.
        compute_dtype: what the products take. hidden and weight are each of this dtype or float32 masters, which are
            rounded to it inside; a master's gradient comes back in float32, as it was accumulated. None is the one
            dtype of hidden and weight.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: naming the argument, what it got and what it needs; also for backend "triton" on a CPU, unless
            TRITON_INTERPRET=1 was in the environment when the package was imported.
    """
    dtype = check_policy_head(hidden, weight, target, bias, temperature, softcap, logits_dtype, compute_dtype)
    form = choose_backend("linear_logprob", backend, hidden.device, has_triton=True)
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    small = 4 * hidden.shape[0] * weight.shape[0] <= KEPT_LOGITS_BYTES
    logprob, row_entropy, *_ = _forward_op(
        hidden,
        weight,
        target,
        bias,
        float(temperature),
        softcap,
        entropy,
        logits_dtype,
        dtype,
        form,
        keep_logits=needs_gradient and small and form == "torch" and hidden.device.type == "cpu",
    )
    return LinearLogprob(logprob, row_entropy if entropy else None)


def _form(form: str) -> ModuleType:
    """The module that computes; Triton is imported when it is used, since not every platform has it."""
    return importlib.import_module(f"asyppo_kernels.linear_logprob.{form}_form")


def forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    logits_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    form: str,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, row_max, log_sum, logits); the last three are for the backward.

    An entropy not wanted is empty, and so are logits that are not kept.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        options = HeadOptions(temperature, softcap, logits_dtype)
        hidden, weight = hidden.to(compute_dtype), weight.to(compute_dtype)
        stats, kept = _form(form).forward(
            hidden, weight, target, bias, options, entropy=entropy, keep_logits=keep_logits
        )
        return *stats, kept


_forward_op = Op("asyppo::linear_logprob", forward, tags=(torch.Tag.cudagraph_unsafe,))


@_forward_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    logits_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    form: str,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def row() -> Tensor:
        return hidden.new_empty(target.shape, dtype=torch.float32)

    kept = hidden.new_empty((target.shape[0] if keep_logits else 0, weight.shape[0]), dtype=torch.float32)
    return row(), row() if entropy else hidden.new_empty(0, dtype=torch.float32), row(), row(), kept


def backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    kept: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    logits_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    form: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias), empty where not needed."""
    with torch.autocast(hidden.device.type, enabled=False):
        return _form(form).backward(
            hidden,
            weight,
            target,
            bias,
            entropy,
            row_max,
            log_sum,
            kept,
            grad_logprob,
            grad_entropy,
            HeadOptions(temperature, softcap, logits_dtype),
            compute_dtype,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
        )


_backward_op = Op("asyppo::linear_logprob_backward", backward, tags=(torch.Tag.cudagraph_unsafe,))


@_backward_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    kept: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    logits_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    form: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return gradient_buffers(hidden, weight, bias, need_hidden, need_weight, need_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = _forward_op.signature.named(inputs)
    ctx.save_for_backward(*(given[name] for name in ("hidden", "weight", "target", "bias")), *output[1:])
    ctx.has_entropy = given["entropy"]
    ctx.options = {name: given[name] for name in ("temperature", "softcap", "logits_dtype", "compute_dtype", "form")}
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_logprob is None:
        grad_logprob = torch.zeros_like(saved[-2])
    if not ctx.has_entropy:
        grad_entropy = None
    needs = _forward_op.signature.named(ctx.needs_input_grad)
    needed = {name: needs[name] for name in HEAD}
    grads = _backward_op(
        *saved, grad_logprob, grad_entropy, **ctx.options, **{f"need_{name}": need for name, need in needed.items()}
    )
    return _forward_op.signature.gradients({name: grad for name, grad in zip(HEAD, grads, strict=True) if needed[name]})


_forward_op.register_autograd(_backward, setup_context=_setup_context)
