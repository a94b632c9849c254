"""Critics as one stacked model, and one after another, each through the trainer's interface."""

from __future__ import annotations

from typing import Any

import torch

from bench.cases import Case, Inputs, Outputs
from bench.ops import critics as op
from bench.registry import Absent, Run, contender, need, need_gpu


def _run(case: Case, critics: Any) -> Run:
    from asyppo.models.critics import CriticOptimizer

    if not case.backward:
        return lambda inputs: {"value": critics.values(op.batch_of(inputs), op.MAX_TOKENS)}
    optimizer = CriticOptimizer(critics, learning_rate=0.0, weight_decay=0.0)
    shares = op.shares_of(case)

    def step(inputs: Inputs) -> Outputs:
        def loss(m: int, micro: Any, value: torch.Tensor) -> torch.Tensor:
            return op.squared_error(micro, value, inputs["target"])

        losses = critics.backward(op.batch_of(inputs), shares, loss, op.MAX_TOKENS)
        critics.collect_gradients()
        outputs = {"loss": losses, **op.gradients_of(critics.models)}
        optimizer.step(losses, 1e9, active=[True] * len(critics))  # no clipping, at all the work of it
        return outputs

    return step


def _stacked(case: Case) -> Run:
    from asyppo.models.critics import StackedCritics

    return _run(case, StackedCritics(op.models_of(case), dtype=case.dtype))


@contender(op.OP, "asyppo (triton)")
def stacked_triton(case: Case) -> Run:
    """Stacked, its norms, rotary embedding and activation in Triton."""
    need_gpu(case)
    return _stacked(case)


@contender(op.OP, "asyppo (torch)")
def stacked_torch(case: Case) -> Run:
    """Stacked, in torch throughout."""
    if case.device.type == "cuda":
        raise Absent("on a GPU the layers are Triton kernels")
    return _stacked(case)


@contender(op.OP, "one by one")
def one_by_one(case: Case) -> Run:
    """M models of transformers, on a GPU with Liger's kernels."""
    from asyppo.models.critics import OneByOneCritics

    models = op.models_of(case)
    if case.device.type == "cuda":
        need("liger_kernel")
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        for model in models:
            _apply_liger_kernel_to_instance(model=model)
    return _run(case, OneByOneCritics(models, dtype=case.dtype))
