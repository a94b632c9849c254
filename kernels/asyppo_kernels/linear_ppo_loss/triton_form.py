"""The loss: matrix products by cuBLAS, and one Triton launch on each chunk of logits for all that is between them."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from asyppo_kernels._args import device_guard
from asyppo_kernels._gemm import accumulate_f32, gradient_operand, mm_f32, mm_into, operand
from asyppo_kernels._policy_head import HeadOptions, gradient_buffers, lines_per_block
from asyppo_kernels._policy_head_kernels import HeadScalars, Workspace, bytes_per_logit, launch_shape, padded
from asyppo_kernels.linear_ppo_loss.kernels import loss_kernel, rows_kernel
from asyppo_kernels.linear_ppo_loss.result import LossAndGradients, RowResults
from asyppo_kernels.linear_ppo_loss.rows import PPOOptions, RowInputs, Rows, chunks

ROWS_BLOCK, ROWS_WARPS = 512, 16  # a row a thread: more would pass through shared memory, since targets have 64 bits


def read_rows(
    given: RowInputs, ppo: PPOOptions, results: RowResults, *, compact: bool
) -> tuple[Rows, tuple[Tensor, Tensor] | None]:
    """(what ``rows.read_rows`` makes of these, ``rows.live_and_dead`` of it if ``compact``), in one launch.

    It puts zeros in ``results``, too. Compaction takes one program, which walks over all rows and counts on.
    """
    target, old_logprob, advantage, token_weight, advantage_keep, entropy_keep, ref_logprob, rollout_weight = (
        None if x is None else x.contiguous() for x in given
    )
    n = len(given.target)
    pitch = padded(n)  # so that all that ``loss_kernel`` is given is aligned, whatever n is
    cleared_target = given.target.new_empty(n)
    numbers = given.target.new_empty(5, pitch, dtype=torch.float32)
    flags = given.target.new_empty(4, pitch, dtype=torch.bool)
    index = given.target.new_empty(2, pitch) if compact else None
    count = given.target.new_empty(2) if compact else None
    rows_kernel[(1 if compact else max(1, triton.cdiv(n, ROWS_BLOCK)),)](
        target,
        old_logprob,
        ref_logprob if ppo.kl_coef != 0 else None,
        advantage,
        rollout_weight,
        token_weight,
        None if advantage_keep is None else advantage_keep.view(torch.uint8),
        None if entropy_keep is None else entropy_keep.view(torch.uint8),
        cleared_target,
        numbers,
        flags.view(torch.uint8),
        results.loss,
        results.logprob,
        results.entropy,
        results.ratio,
        results.clipped.view(torch.uint8),
        index,
        count,
        n,
        pitch,
        ENTROPY=ppo.entropy_coef != 0,
        BLOCK=ROWS_BLOCK,
        num_warps=ROWS_WARPS,
    )
    old, *others = numbers[:, :n].unbind()
    rows = Rows(cleared_target, None if old_logprob is None else old, *others, *flags[:, :n].unbind())
    if index is None or count is None:
        return rows, None
    n_live, n_dead = count.tolist()
    return rows, (index[0, :n_live], index[1, :n_dead])


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    given: RowInputs,
    head: HeadOptions,
    ppo: PPOOptions,
    *,
    compact: bool,
    dead_row_stats: bool,
    workspace_bytes: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> LossAndGradients:
    """A row's gradient depends on that row alone, so it is formed while the row's logits are there: three GEMMs."""
    n, v = len(hidden), len(weight)
    loss, logprob, entropy, ratio = (hidden.new_empty(n, dtype=torch.float32) for _ in range(4))
    results = RowResults(loss, logprob, entropy, ratio, hidden.new_empty(n, dtype=torch.bool))
    needed = need_hidden, need_weight, need_bias
    _, d_weight, d_bias = gradient_buffers(hidden, weight, bias, *needed, dtype=torch.float32, empty=True)
    d_hidden, _, _ = gradient_buffers(hidden, weight, bias, need_hidden, False, False, dtype=torch.float32)
    need_gradient = any(needed)

    w = operand(weight)
    w_for_gradient = gradient_operand(w) if need_hidden else w
    bias = None if bias is None else bias.contiguous()
    bytes_each = bytes_per_logit(hidden, head, gradient=need_gradient)
    limit = lines_per_block(padded(v), hidden.device, workspace_bytes, bytes_per_element=bytes_each)
    block, num_warps = launch_shape(v, softcap=head.softcap is not None)
    workspace: Workspace | None = None
    first_gradient = True
    with device_guard(hidden):
        rows, compacted = read_rows(given, ppo, results, compact=compact)
        shown = rows.counted if dead_row_stats else rows.live
        entropy_on = rows.entropy_on.view(torch.uint8)
        for index, live in chunks(n, limit, compacted, dead_row_stats=dead_row_stats):
            x = hidden[index]
            if not compact:  # rows that do not count are still here, and 0 * NaN would reach d_weight
                x = x.where(shown[index][:, None], 0.0)
            if workspace is None or len(x) > len(workspace.buffer):
                workspace = None  # free the old memory first
                workspace = Workspace(hidden, head, len(x), v, gradient=need_gradient)
            z = workspace.logits(operand(x), w)
            grad = workspace.gradient(z)
            live = live and need_gradient
            loss_kernel[(len(x),)](
                z,
                grad,
                None if isinstance(index, slice) else index,
                rows.target,
                rows.old_logprob,
                rows.ref_logprob,
                rows.advantage,
                rows.rollout_weight,
                rows.token_weight,
                entropy_on,
                bias,
                results.loss,
                results.logprob,
                results.entropy,
                results.ratio,
                results.clipped.view(torch.uint8),
                index.start if isinstance(index, slice) else 0,
                v,
                workspace.pitch,
                grad.stride(0),
                *HeadScalars.of(head),
                1.0 - ppo.clip_low,
                1.0 + ppo.clip_high,
                ppo.dual_clip or 0.0,
                ppo.entropy_coef,
                ppo.kl_coef,
                SOFTCAP=head.softcap is not None,
                DUAL_CLIP=ppo.dual_clip is not None,
                KL=ppo.kl_coef != 0,
                KL_BIAS_CORRECTION=ppo.kl_bias_correction,
                DEAD_ROW_STATS=dead_row_stats,
                GRADIENT=live,
                OVERLAPS=workspace.overlaps,
                BLOCK=block,
                num_warps=num_warps,
            )
            if not live:
                continue
            if need_bias:
                total = grad.sum(dim=0, dtype=torch.float32)
                d_bias.copy_(total) if first_gradient else d_bias.add_(total)
            grad = operand(grad)
            if need_hidden:
                if isinstance(index, slice):
                    mm_into(d_hidden[index], grad, w_for_gradient)
                else:
                    d_hidden[index] = mm_f32(grad, w_for_gradient)
            if need_weight:
                accumulate_f32(d_weight, grad.t(), gradient_operand(x), first=first_gradient)
            first_gradient = False
    if first_gradient:
        d_weight.zero_()
        d_bias.zero_()
    return LossAndGradients(results.loss.sum(), *results[1:], d_hidden, d_weight, d_bias)
