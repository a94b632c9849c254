"""liger-kernel: its scaled cross entropy, its fused linear cross entropy, and its fused linear GRPO loss."""

from __future__ import annotations

import shutil

import torch
from torch import Tensor

from bench.cases import Case, Head, Inputs, Outputs, Run
from bench.contenders.heads import policy_head
from bench.ops import linear_ppo_loss
from bench.ops.policy_head import wants_entropy
from bench.registry import Absent, contender, need, need_gpu

ROWS_AT_ONCE = 2048  # "sequences" a chunk of the GRPO loss; its default of one would be one token here


@policy_head("liger scaled cross entropy", less="entropy in the dtype of hidden")
def scaled_cross_entropy(case: Case) -> Head:
    """The SM90 kernel on a Hopper GPU, elsewhere its torch fallback in chunks of 512 tokens."""
    function = need("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    temperature, entropy = float(case.options["temperature"]), wants_entropy(case)

    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        result = function.apply(hidden, weight, target, temperature, -100, 1, entropy)
        nll, entropies = result if entropy else (result, None)
        return -nll, entropies

    return head


@policy_head(
    "liger fused linear cross entropy", entropy=False, temperature=False, less="no entropy", accumulates=("d_weight",)
)
def fused_linear_cross_entropy(case: Case) -> Head:
    """The pretraining loss, unreduced."""
    function = need("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    need_gpu(case)

    def head(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return -function(hidden, weight, target, reduction="none"), None

    return head


@contender(
    "linear_ppo_loss",
    "liger fused linear GRPO",
    less="no entropy; its advantages are per sequence, so each token is passed as a sequence of one",
)
def fused_linear_grpo(case: Case) -> Run:
    """Its loss without KL term; the mean over tokens is what the token weights here amount to."""
    if case.options["entropy_coef"]:
        raise Absent("has no entropy bonus")
    loss_class = need("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    loss = loss_class(
        beta=0.0,
        compiled=case.device.type == "cuda" or shutil.which("g++") is not None,
        use_ref_model=False,
        chunk_size=ROWS_AT_ONCE,
        epsilon_low=linear_ppo_loss.CLIP_LOW,
        epsilon_high=linear_ppo_loss.CLIP_HIGH,
        loss_type="bnpo",
        temperature=float(case.options["temperature"]),
    )
    ones = torch.ones(case.sizes["N"], 1, device=case.device)

    def run(inputs: Inputs) -> Outputs:
        value, _ = loss(
            inputs["hidden"][:, None],
            inputs["weight"],
            inputs["target"][:, None],
            ones,
            inputs["advantage"] * inputs["advantage_keep"],
            old_per_token_logps=inputs["old_logprob"][:, None],
        )
        return {"loss": value.detach()} | linear_ppo_loss.gradients(value, inputs)

    return run
