"""What the suite asks of each op: its cases, its inputs, the least work they take, and how its outputs are judged."""

from __future__ import annotations

from types import ModuleType

from bench.ops import (
    agreement_masks,
    critics,
    ensemble_gae,
    ensemble_value,
    linear_logprob,
    linear_ppo_loss,
    train_step,
    update,
)

OPS: dict[str, ModuleType] = {
    module.OP: module
    for module in (
        update,
        linear_ppo_loss,
        linear_logprob,
        ensemble_value,
        ensemble_gae,
        agreement_masks,
        critics,
        train_step,
    )
}
