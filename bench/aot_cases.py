"""The kernels that ``bench.aot`` compiles, specialised as they are launched on a policy of 8 billion parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from asyppo_kernels._policy_head_kernels import launch_shape
from asyppo_kernels.linear_logprob import kernels as linear_logprob
from asyppo_kernels.linear_ppo_loss import kernels as linear_ppo_loss
from asyppo_kernels.linear_ppo_loss.triton_form import ROWS_BLOCK, ROWS_WARPS
from bench import aot_ensemble, aot_stacked
from bench.aot_case import Case

VOCABULARY = 151_936
NUMBERS = ("old_logprob_ptr", "ref_logprob_ptr", "advantage_ptr", "rollout_weight_ptr", "token_weight_ptr")
RESULTS = ("loss_ptr", "logprob_ptr", "entropy_ptr", "ratio_ptr")


def policy_head() -> Iterator[Case]:
    """Both ops with float32 and bfloat16 logits of bfloat16 inputs, plain; and with all there is to them."""
    head: dict[str, Any] = dict.fromkeys(("inv_temperature", "softcap", "inv_softcap"), "fp32")
    shape = {"n_columns": "i32", "pitch": "i32"}
    rows = {"index_ptr": "*i64", "target_ptr": "*i64"}
    stats = dict.fromkeys(("entropy_ptr", "row_max_ptr", "log_sum_ptr"), "*fp32")
    # Three programs of 8 warps a multiprocessor. Shared memory holds the reductions.
    budget: dict[str, Any] = {"max_registers": 80, "max_shared": 4096}
    for logits, full, divisible in (
        ("fp32", False, True),
        ("bf16", False, True),
        ("fp32", True, True),
        ("fp32", False, False),
    ):
        name = f"{logits} logits" + (", bias, softcap" if full else "") + ("" if divisible else ", odd V")
        block, num_warps = launch_shape(VOCABULARY, softcap=full)
        budget["num_warps"] = num_warps
        pitches = ("n_columns", "pitch") if divisible else ("pitch",)
        bias: dict[str, Any] = {"bias_ptr": "*bf16"} if full else {}
        constants: dict[str, Any] = {"SOFTCAP": full, "BLOCK": block} | ({} if full else {"bias_ptr": None})
        gradient = {"z_ptr": f"*{logits}", "grad_ptr": "*bf16", "grad_pitch": "i32"}
        yield Case(
            op="linear_logprob",
            name=f"statistics, {name}",
            kernel=linear_logprob.statistics_kernel,
            signature={"z_ptr": f"*{logits}", **rows, **bias, "logprob_ptr": "*fp32", **stats, **shape, **head}
            | {"first_row": "i32"},
            constants=constants,
            divisible=pitches,
            **budget,
        )
        yield Case(
            op="linear_logprob",
            name=f"gradient, {name}",
            kernel=linear_logprob.gradient_kernel,
            signature={**gradient, **rows, **bias, **stats, **shape, **head}
            | {"grad_logprob_ptr": "*fp32", "grad_entropy_ptr": "*fp32", "first_column": "i32"},
            constants=constants | {"OVERLAPS": logits == "fp32"},
            divisible=(*pitches, "grad_pitch"),
            wide=("load", "store"),
            **budget,
        )
        yield Case(
            op="linear_ppo_loss",
            name=f"loss, {name}" + (", dual clip, KL" if full else ""),
            kernel=linear_ppo_loss.loss_kernel,
            signature={**gradient, **rows, **bias, **shape, **head, "first_row": "i32"}
            | dict.fromkeys((*NUMBERS, *RESULTS), "*fp32")
            | {"entropy_on_ptr": "*u8", "clipped_ptr": "*u8"}
            | dict.fromkeys(("ratio_low", "ratio_high", "dual_clip", "entropy_coef", "kl_coef"), "fp32"),
            constants=constants
            | {
                "OVERLAPS": logits == "fp32",
                "DUAL_CLIP": full,
                "KL": full,
                "KL_BIAS_CORRECTION": full,
                "DEAD_ROW_STATS": True,
                "GRADIENT": True,
            },
            divisible=(*pitches, "grad_pitch"),
            wide=("load", "store"),
            **budget,
        )


def rows() -> Case:
    """All that may be given, compacted."""
    return Case(
        op="linear_ppo_loss",
        name="rows",
        kernel=linear_ppo_loss.rows_kernel,
        signature=dict.fromkeys(("target_ptr", "cleared_target_ptr", "index_ptr", "count_ptr"), "*i64")
        | dict.fromkeys((*NUMBERS, "numbers_ptr", *RESULTS), "*fp32")
        | dict.fromkeys(("advantage_keep_ptr", "entropy_keep_ptr", "flags_ptr", "clipped_ptr"), "*u8")
        | {"n_rows": "i32", "pitch": "i32"},
        constants={"ENTROPY": True, "BLOCK": ROWS_BLOCK},
        divisible=("pitch",),
        num_warps=ROWS_WARPS,
        wide=(),  # any number of rows
        max_registers=80,
        max_shared=1024,
    )


CASES: list[Case] = [*policy_head(), rows(), *aot_ensemble.CASES, *aot_stacked.CASES]
