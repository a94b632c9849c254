"""The public function, and the custom ops under it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asyppo_kernels._args import FLOATS, Backend, check_number, check_tensor, choose_backend
from asyppo_kernels._policy_head import HeadOptions, check_policy_head, gradient_buffers
from asyppo_kernels._registration import Op, is_last_use
from asyppo_kernels.linear_ppo_loss.result import LinearPPOLoss
from asyppo_kernels.linear_ppo_loss.rows import PPOOptions, RowInputs

HEAD = ("hidden", "weight", "bias")  # what gets gradients


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    token_weight: Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
    advantage_keep: Tensor | None = None,
    entropy_keep: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl_bias_correction: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    compact: bool = True,
    dead_row_stats: bool = True,
    workspace_bytes: int | None = None,
    backend: Backend = "auto",
) -> LinearPPOLoss:
    """AsyPPO's policy loss from hidden states, its gradients formed in the forward: three GEMMs, one chunk of logits.

    With z as in ``linear_logprob``, logp and H the log-prob of the target and the entropy of softmax(z), r = exp(logp -
    old_logprob) with the exponent clamped to [-20, 20], A the advantage, u the rollout weight and w the token weight::

        s    = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A);  where A < 0 and dual_clip is set: max(s, dual_clip A)
        k3   = exp(d) - d - 1,  d = ref_logprob - logp clamped to [-20, 20];  with kl_bias_correction: r times that
        loss = sum_t w_t (-keepA_t u_t s_t - entropy_coef keepH_t H_t + kl_coef k3_t)

    This is minus the policy objective of AsyPPO (arXiv 2510.01656; keepA and keepH are its I^A and I^H), which rests on
    PPO's clipped surrogate (arXiv 1707.06347), with the dual clip of arXiv 1912.09729 and the k3 estimate of the KL
    divergence from the reference policy added. ``token_weight`` carries every normalisation (1/|o|, 1/batch, 0 for
    padding), so the losses of micro-batches add up to that of the batch.

    The loss is differentiable in ``hidden``, ``weight`` and ``bias``, for any upstream scalar, once; the gradients are
    accumulated in float32 and come in their input's dtype. None is formed for an input that needs none, nor under
    ``torch.no_grad``, where the op is one GEMM. If no row counts, the loss is 0, attached, its gradients zero. The op
    computes in ``compute_dtype``: ``torch.autocast`` neither casts its inputs nor reaches inside. Under
    ``torch.compile`` each new value of a number is a recompilation.

    A row is live if w != 0 and the loss can move with it: keepA and A u != 0, or entropy_coef != 0 and keepH, or
    kl_coef != 0. Only live rows join the two GEMMs of the gradients. Rows with w = 0 or target = -100 are not read, do
    no work and return 0, so average a statistic over w != 0. Advantage and rollout weight are not read where keepA is
    false. Whatever is not read may be NaN.

    Args:
        hidden: [N, H], float32, bfloat16 or float16: row t holds the hidden state that predicts target t.
        weight: [V, H], the dtype of hidden; with ``compute_dtype`` its own, see there.
        target: [N] int64: token in [0, V), or -100. Values are not checked.
        old_logprob: [N], any float dtype, as all [N] numbers here: log-prob of the target under the policy that the
            ratio compares with. None is the row's own log-prob, detached, as in the first update after a rollout: r is
            exp(logp - logp.detach()), whose value is 1 and whose gradient is logp's; ``clipped`` is false.
        advantage: [N].
        token_weight: [N]: w.
        compute_dtype: what the products take. hidden and weight are each of this dtype or float32 masters, which are
            rounded to it once a call; a master's gradient comes back in float32, as it was accumulated. None is the
            one dtype of hidden and weight.
        advantage_keep: [N] bool: I^A; None keeps all.
        entropy_keep: [N] bool: I^H; None keeps all.
        ref_logprob: [N]: log-prob under the reference policy; needed if kl_coef != 0, else not read.
        rollout_weight: [N]: u, an importance weight for a sampler that is not quite the old policy; None is 1.
        bias: [V], float32, bfloat16 or float16.
        temperature: above 0.
        softcap: above 0, or None.
        clip_low: at least 0.
        clip_high: at least 0.
        dual_clip: above 1, or None.
        entropy_coef: weight of the entropy bonus.
        kl_coef: weight of k3.
        kl_bias_correction: k3 times the ratio, with the gradient of both: an estimate for samples of the old policy
            (DeepSeek-V3.2, arXiv 2512.02556; TRL's use_bias_correction_kl). The ratio's gradient is zero where its
            clamp binds. Without effect if kl_coef is 0.
        logits_dtype: what the product hidden weight^T, accumulated in float32, is stored in. bfloat16 halves the
            traffic and moves a log-prob by up to 0.15, against a clip of 0.2.
        compact: gather the rows that count, at the cost of one host synchronisation. False has none, and computes all
            rows.
        dead_row_stats: False spares the first GEMM, too, the rows that count but are not live; they return 0.
        workspace_bytes: the most that the logits of a chunk, with what is made of them, may take; at least one row is
            computed at a time. None is 2.5 GiB, and on a CPU what 1024 rows take, from 32 to 128 MiB,
            or 256 rows, up to 256 MiB.
        backend: "auto", "triton" or "torch".

    Returns:
        ``loss``, a float32 scalar, and, detached, ``logprob``, ``entropy``, ``ratio`` (float32) and ``clipped`` (bool),
        all [N]. ``clipped`` is true where keepA and A != 0 but the ratio has no gradient: clip, dual clip or the
        clamp of the log-ratio binds.

    Raises:
        ValueError: naming the argument, what it got and what it needs; also for backend "triton" on a CPU, unless
            TRITON_INTERPRET=1 was in the environment when the package was imported.
    """
    dtype = check_policy_head(hidden, weight, target, bias, temperature, softcap, logits_dtype, compute_dtype)
    n, device = hidden.shape[0], hidden.device

    def check_rows(name: str, value: Tensor, dtypes: Sequence[torch.dtype]) -> None:
        check_tensor(name, value, shape=[n], needs=f"[N] = [{n}]", dtypes=dtypes, device=device)

    number = (*FLOATS, torch.float64)
    if old_logprob is not None:
        check_rows("old_logprob", old_logprob, number)
    check_rows("advantage", advantage, number)
    check_rows("token_weight", token_weight, number)
    if ref_logprob is not None:
        check_rows("ref_logprob", ref_logprob, number)
    if rollout_weight is not None:
        check_rows("rollout_weight", rollout_weight, number)
    if advantage_keep is not None:
        check_rows("advantage_keep", advantage_keep, [torch.bool])
    if entropy_keep is not None:
        check_rows("entropy_keep", entropy_keep, [torch.bool])
    check_number("clip_low", clip_low, "a number of at least 0", low=0.0)
    check_number("clip_high", clip_high, "a number of at least 0", low=0.0)
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, "a number above 1, or None", low=1.0, low_open=True)
    check_number("entropy_coef", entropy_coef, "a finite number")
    check_number("kl_coef", kl_coef, "a finite number")
    if not isinstance(kl_bias_correction, bool):
        raise ValueError(f"kl_bias_correction: got {kl_bias_correction!r}, needs True or False")
    if kl_coef != 0 and ref_logprob is None:
        raise ValueError(f"ref_logprob: got None, needs [N] = [{n}], since kl_coef is {kl_coef}")
    if workspace_bytes is not None and (not isinstance(workspace_bytes, int) or workspace_bytes <= 0):
        raise ValueError(f"workspace_bytes: got {workspace_bytes!r}, needs a positive int, or None")
    form = choose_backend("linear_ppo_loss", backend, device, has_triton=True)

    grad = torch.is_grad_enabled()
    loss, *stats = _forward_op(
        hidden,
        weight,
        target,
        None if old_logprob is None else old_logprob.detach(),
        advantage.detach(),
        token_weight.detach(),
        advantage_keep,
        entropy_keep,
        None if ref_logprob is None else ref_logprob.detach(),
        None if rollout_weight is None else rollout_weight.detach(),
        bias,
        float(temperature),
        None if softcap is None else float(softcap),
        float(clip_low),
        float(clip_high),
        None if dual_clip is None else float(dual_clip),
        float(entropy_coef),
        float(kl_coef),
        kl_bias_correction,
        logits_dtype,
        dtype,
        compact,
        dead_row_stats,
        workspace_bytes,
        form,
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )[:5]
    return LinearPPOLoss(loss, *(value.detach() for value in stats))


def forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    token_weight: Tensor,
    advantage_keep: Tensor | None,
    entropy_keep: Tensor | None,
    ref_logprob: Tensor | None,
    rollout_weight: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    kl_bias_correction: bool,
    logits_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    compact: bool,
    dead_row_stats: bool,
    workspace_bytes: int | None,
    form: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprob, entropy, ratio, clipped, d_hidden, d_weight, d_bias), a gradient not needed being empty."""
    ppo = PPOOptions(clip_low, clip_high, dual_clip, entropy_coef, kl_coef, kl_bias_correction)
    with torch.autocast(hidden.device.type, enabled=False):
        given = RowInputs(
            target,
            old_logprob,
            advantage,
            token_weight,
            advantage_keep,
            entropy_keep,
            ref_logprob,
            rollout_weight,
        )
        # Triton is imported when it is used, since not every platform has it.
        return importlib.import_module(f"asyppo_kernels.linear_ppo_loss.{form}_form").forward(
            hidden.to(compute_dtype),
            weight.to(compute_dtype),
            bias,
            given,
            HeadOptions(temperature, softcap, logits_dtype),
            ppo,
            compact=compact,
            dead_row_stats=dead_row_stats,
            workspace_bytes=workspace_bytes,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
        )


_forward_op = Op("asyppo::linear_ppo_loss", forward, tags=(torch.Tag.cudagraph_unsafe,))


@_forward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    given = _forward_op.signature.named(args)
    hidden, weight, bias, target = (given[name] for name in (*HEAD, "target"))
    need_hidden, need_weight, need_bias = (given[f"need_{name}"] for name in HEAD)
    statistics = (hidden.new_empty(target.shape, dtype=torch.float32) for _ in range(3))
    clipped = hidden.new_empty(target.shape, dtype=torch.bool)
    gradients = gradient_buffers(hidden, weight, bias, need_hidden, need_weight, need_bias, dtype=torch.float32)
    return hidden.new_empty((), dtype=torch.float32), *statistics, clipped, *gradients


def scale_cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x * scale`` in ``dtype``: the upstream gradient and the cast, in one launch and rounded once."""
    return torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype))


_scale_cast_op = Op("asyppo::scale_cast", scale_cast)


@_scale_cast_op.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = _forward_op.signature.named(inputs)
    ctx.dtypes = {name: given[name].dtype for name in HEAD if given[f"need_{name}"]}
    ctx.save_for_backward(*output[-3:])
    ctx.set_materialize_grads(False)  # or the outputs that are saved get zeros of their size


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return _forward_op.signature.gradients({})
    formed = dict(zip(HEAD, ctx.saved_tensors, strict=True))
    last = is_last_use(ctx)

    def scaled(x: Tensor, dtype: torch.dtype) -> Tensor:
        if last and x.dtype == dtype:
            return x.detach().mul_(grad_loss)  # the weight's gradient is large, and there is no need of two
        return _scale_cast_op(x, grad_loss, dtype)

    return _forward_op.signature.gradients({name: scaled(formed[name], dtype) for name, dtype in ctx.dtypes.items()})


_forward_op.register_autograd(_backward, setup_context=_setup_context)
