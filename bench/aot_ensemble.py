"""The cases of ``bench.aot`` of the ensemble ops: two critics of width 1024, 512 rows of 8192 steps."""

from __future__ import annotations

from collections.abc import Mapping

from asyppo_kernels.agreement_masks import kernels as masks
from asyppo_kernels.agreement_masks import triton_form as levels
from asyppo_kernels.ensemble_gae import kernels as gae
from asyppo_kernels.ensemble_value import kernels as value
from bench.aot_case import Case


def integers(names: str, width: str = "i32") -> Mapping[str, str]:
    """Signature of the arguments in ``names``."""
    return dict.fromkeys(names.split(), width)


VALUE_STRIDES = "hidden_k hidden_n weight_k"
GAE_STRIDES = "value_k value_b reward_b mask_b"
GAE_NUMBERS = "gamma decay value_decay"
GAE_INPUTS = {"value": "*fp32", "reward": "*fp32", "mask": "*u8"}
MASKS = {"std": "*fp32", "mask": "*u8"}
CONTIGUOUS = {"value_t": 1, "reward_t": 1, "mask_t": 1}

CASES = [
    Case(
        op="ensemble_value",
        name="forward",
        kernel=value.forward_kernel,
        signature={"hidden": "*bf16", "weight": "*bf16", "bias": "*bf16"}
        | dict.fromkeys(("value", "mean", "std"), "*fp32")
        | integers(f"n h {VALUE_STRIDES}"),
        constants={"hidden_h": 1, "weight_h": 1, "bias_k": 1, "M": 2, "BLOCK_N": 8, "BLOCK_H": 1024},
        divisible=("n", "h", *VALUE_STRIDES.split()),
    ),
    Case(
        op="ensemble_value",
        name="backward",
        kernel=value.backward_kernel,
        signature={"grad": "*fp32", "hidden": "*bf16", "weight": "*bf16", "grad_hidden": "*bf16", "partial": "*fp32"}
        | integers(f"n h part_rows grad_k {VALUE_STRIDES} grad_hidden_k grad_hidden_n"),
        constants={"grad_n": 1, "hidden_h": 1, "weight_h": 1, "grad_hidden_h": 1, "BLOCK_N": 8, "BLOCK_H": 512},
        divisible=("n", "h", "part_rows", "grad_k", *VALUE_STRIDES.split(), "grad_hidden_k", "grad_hidden_n"),
        wide=("load", "store"),
    ),
    Case(
        op="ensemble_value",
        name="sum of the parts",
        kernel=value.add_parts_kernel,
        signature={"partial": "*fp32", "grad_weight": "*bf16", "grad_bias": "*bf16", "parts": "i32", "h": "i32"},
        constants={"BLOCK_P": 64, "BLOCK_H": 32},
        divisible=("parts", "h"),
        wide=(),  # a line of partial sums is h + 1 long
    ),
    Case(
        op="ensemble_gae",
        num_warps=1,
        max_registers=168,  # twelve programs a multiprocessor
        amd={"BLOCK_T": 1024},
        name="scan",
        kernel=gae.gae_kernel,
        signature=GAE_INPUTS
        | dict.fromkeys(("advantage", "returns", "mean_out", "std_out"), "*fp32")
        | integers(f"b t span {GAE_STRIDES}")
        | integers(GAE_NUMBERS, "fp32"),
        constants={
            "row_lam": None,
            "summary": None,
            "chunks": 1,
            **CONTIGUOUS,
            "M": 2,
            "ROWS": 1,
            "BLOCK_T": 512,
            "BLOCK_CHUNKS": 1,
        },
        divisible=("b", "t", "span", *GAE_STRIDES.split()),
        wide=("load", "store"),
    ),
    Case(
        op="ensemble_gae",
        num_warps=1,
        max_registers=168,  # twelve programs a multiprocessor
        max_registers_with={"3.6": 184},  # eleven: its sm_80 code takes 178
        amd={"ROWS": 8},
        name="scan of short rows",
        kernel=gae.gae_kernel,
        signature=GAE_INPUTS
        | dict.fromkeys(("advantage", "returns", "mean_out", "std_out"), "*fp32")
        | integers(f"b t span {GAE_STRIDES}")
        | integers(GAE_NUMBERS, "fp32"),
        constants={
            "row_lam": None,
            "summary": None,
            "chunks": 1,
            **CONTIGUOUS,
            "M": 2,
            "ROWS": 4,
            "BLOCK_T": 128,
            "BLOCK_CHUNKS": 1,
        },
        divisible=("b", "t", "span", *GAE_STRIDES.split()),
        wide=("load", "store"),
    ),
    Case(
        op="ensemble_gae",
        num_warps=1,
        max_registers=168,  # twelve programs a multiprocessor
        amd={"BLOCK_T": 1024},
        name="scan, a lambda a row",
        kernel=gae.gae_kernel,
        signature=GAE_INPUTS
        | {"row_lam": "*fp32"}
        | dict.fromkeys(("advantage", "returns", "mean_out", "std_out"), "*fp32")
        | integers(f"b t span {GAE_STRIDES}")
        | integers(GAE_NUMBERS, "fp32"),
        constants={"summary": None, "chunks": 1, **CONTIGUOUS, "M": 2, "ROWS": 1, "BLOCK_T": 512, "BLOCK_CHUNKS": 1},
        divisible=("b", "t", "span", *GAE_STRIDES.split()),
        wide=("load", "store"),
    ),
    Case(
        op="ensemble_gae",
        num_warps=1,
        max_registers=168,  # twelve programs a multiprocessor
        amd={"BLOCK_T": 1024},
        name="summaries of chunks",
        kernel=gae.summary_kernel,
        signature=GAE_INPUTS | {"summary": "*fp32"} | integers(f"t span {GAE_STRIDES}") | integers(GAE_NUMBERS, "fp32"),
        constants={"row_lam": None, "b": 1, **CONTIGUOUS, "M": 2, "BLOCK_T": 512},
        divisible=("t", "span", *GAE_STRIDES.split()),
    ),
    Case(
        op="ensemble_gae",
        num_warps=1,
        max_registers=168,  # twelve programs a multiprocessor
        amd={"BLOCK_T": 1024},
        name="scan of chunks",
        kernel=gae.gae_kernel,
        signature=GAE_INPUTS
        | dict.fromkeys(("summary", "advantage", "returns", "mean_out", "std_out"), "*fp32")
        | integers(f"t span chunks {GAE_STRIDES}")
        | integers(GAE_NUMBERS, "fp32"),
        constants={"row_lam": None, "b": 1, **CONTIGUOUS, "M": 2, "ROWS": 1, "BLOCK_T": 512, "BLOCK_CHUNKS": 64},
        divisible=("t", "span", "chunks", *GAE_STRIDES.split()),
        wide=("load", "store"),
    ),
    Case(
        op="agreement_masks",
        name="begin",
        kernel=masks.begin_kernel,
        signature=MASKS | {"counts": "*i64", "span": "*i64"} | integers("n total"),
        constants={"BLOCK": levels.SAMPLE},
        divisible=("n", "total"),
        num_warps=8,
        wide=(),  # a sample
        max_registers=64,
    ),
    Case(
        op="agreement_masks",
        name="count, level 0",
        kernel=masks.count_all_kernel,
        signature=MASKS | {"span": "*i64", "counts": "*i64"} | integers("n"),
        constants={"BINS": levels.BINS[0], "BLOCK": levels.BLOCK},
        divisible=("n",),
        max_registers=64,
    ),
    *(
        Case(
            op="agreement_masks",
            name=f"count, level {level}",
            kernel=masks.count_kernel,
            signature=MASKS
            | dict.fromkeys(("counts_before", "state_before", "counts", "state"), "*i64")
            | integers("n low_ppm high_ppm"),
            constants={
                "LEVEL": level,
                "BINS_BEFORE": levels.BINS[level - 1],
                "BINS": levels.BINS[level],
                "PIECE": levels.PIECE,
                "BLOCK": levels.INNER_BLOCK,
            },
            divisible=("n",),
            max_registers=96,
        )
        for level in range(1, levels.LEVELS)
    ),
    Case(
        op="agreement_masks",
        name="apply",
        kernel=masks.apply_kernel,
        signature=MASKS
        | {"counts": "*i64", "state": "*i64"}
        | dict.fromkeys(("advantage_keep", "entropy_keep"), "*u8")
        | dict.fromkeys(("low_out", "high_out"), "*fp32")
        | integers("n low_ppm high_ppm"),
        constants={"LEVEL": levels.LEVELS - 1, "BINS": levels.BINS[-1], "BLOCK": levels.BLOCK},
        divisible=("n",),
    ),
]
