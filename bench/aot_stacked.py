"""The cases of ``bench.aot`` of the stacked layers: critics of Qwen3-0.6B's shape in bfloat16."""

from __future__ import annotations

from typing import Any

from asyppo_kernels.stacked_layers import kernels
from asyppo_kernels.stacked_layers.triton_form import _element_tile, _head_tile, _row_tile
from bench.aot_case import Case
from bench.aot_ensemble import integers

CRITICS, TOKENS, WIDTH, INTERMEDIATE = 2, 32_768, 1024, 3072
HEADS = (16, 8, 128)  # of queries, of keys, and the dimensions of one


def rms_norm(name: str, residual: bool, width: int = WIDTH, **budget: Any) -> list[Case]:
    """Forward and backward with all gradients."""
    rows, block_h, num_warps = _row_tile(TOKENS, width)
    tile = {"ROWS": rows, "BLOCK_H": block_h}
    strides = "x_m x_n weight_m" + (" residual_m residual_n" if residual else "")
    back = "summed_m summed_n weight_m grad_normed_m grad_normed_n" + (
        " grad_summed_m grad_summed_n" if residual else ""
    )
    return [
        Case(
            op="stacked_rms_norm",
            name=f"forward{name}",
            kernel=kernels.rms_norm_kernel,
            signature=dict.fromkeys(("x", "weight", "normed", *(("residual", "summed") if residual else ())), "*bf16")
            | {"n": "i32", "h": "i32", "eps": "fp32"}
            | integers(strides),
            constants=tile
            | dict.fromkeys(("x_h", "weight_h"), 1)
            | ({"residual_h": 1} if residual else {"residual": None, "summed": None} | _none("residual", "mnh")),
            divisible=("n", "h", *strides.split()),
            num_warps=num_warps,
            wide=("load", "store"),
            **budget,
        ),
        Case(
            op="stacked_rms_norm",
            name=f"backward{name}",
            kernel=kernels.rms_norm_backward_kernel,
            signature=dict.fromkeys(
                ("grad_normed", "summed", "weight", "grad_input", *(("grad_summed",) if residual else ())), "*bf16"
            )
            | {"partial": "*fp32", "n": "i32", "h": "i32", "eps": "fp32", "part_rows": "i32"}
            | integers(back),
            constants=tile
            | dict.fromkeys(("summed_h", "weight_h", "grad_normed_h"), 1)
            | ({"grad_summed_h": 1} if residual else {"grad_summed": None} | _none("grad_summed", "mnh")),
            divisible=("n", "h", "part_rows", *back.split()),
            num_warps=num_warps,
            wide=("load", "store"),
            **budget,
        ),
    ]


def qk_norm_rope(name: str, norm: bool) -> list[Case]:
    """Forward and backward with all gradients."""
    tile = _head_tile(*HEADS)
    inputs = "q_m q_n q_h k_m k_n k_h"
    angles = "cos_m cos_n sin_m sin_n"
    weights = "q_weight_m k_weight_m"
    grads = "grad_q_m grad_q_n grad_q_h grad_k_m grad_k_n grad_k_h"
    numbers = {**integers("n q_heads k_heads half"), "eps": "fp32"}
    angle_ones = dict.fromkeys(("cos_d", "sin_d"), 1)
    ones = dict.fromkeys(("q_d", "k_d"), 1)
    extra = f"part_tokens {inputs} {weights}"
    with_weights = {"q_weight_d": 1, "k_weight_d": 1}
    no_weights = {"q_weight": None, "k_weight": None} | _none("q_weight", "md") | _none("k_weight", "md")
    out = dict.fromkeys(("q_out", "k_out", "cos", "sin"), "*bf16")
    both = dict.fromkeys(("q", "k"), "*bf16")
    weight = dict.fromkeys(("q_weight", "k_weight"), "*bf16") | integers(weights)
    forward = Case(
        op="stacked_qk_norm_rope",
        name=f"forward{name}",
        kernel=kernels.qk_norm_rope_kernel,
        signature=both | out | numbers | integers(f"{inputs} {angles}") | (weight if norm else {}),
        constants=tile | angle_ones | ones | (with_weights if norm else no_weights),
        divisible=("n", "q_heads", "half", *angles.split(), *inputs.split(), *(weights.split() if norm else ())),
        wide=(),  # of 16 heads a wave of 64 lanes takes 8 bytes a lane
    )
    absent = {"q": None, "k": None, "q_partial": None, "k_partial": None} | _none("q", "mnhd") | _none("k", "mnhd")
    backward = Case(
        op="stacked_qk_norm_rope",
        name=f"backward{name}",
        kernel=kernels.qk_norm_rope_backward_kernel,
        signature=out
        | dict.fromkeys(("grad_q", "grad_k"), "*bf16")
        | numbers
        | integers(f"{grads} {angles}")
        | (
            both | weight | integers(f"part_tokens {inputs}") | dict.fromkeys(("q_partial", "k_partial"), "*fp32")
            if norm
            else {}
        ),
        constants=tile
        | angle_ones
        | dict.fromkeys(("grad_q_d", "grad_k_d"), 1)
        | (ones | with_weights if norm else no_weights | absent | {"part_tokens": 1}),
        divisible=("n", "q_heads", "half", *angles.split(), *grads.split(), *(extra.split() if norm else ())),
        wide=(),
        max_registers=168,  # three programs a multiprocessor: more in flight than two of eight warps
    )
    return [forward, backward]


def swiglu() -> list[Case]:
    """Forward and backward of the halves of one tensor."""
    rows, block = _element_tile(TOKENS, INTERMEDIATE)
    tile = {"ROWS": rows, "BLOCK": block}
    strides = "gate_m gate_n up_m up_n"
    return [
        Case(
            op="stacked_swiglu",
            name="forward",
            kernel=kernels.swiglu_kernel,
            signature=dict.fromkeys(("gate", "up", "out"), "*bf16") | integers(f"n width {strides}"),
            constants=tile | {"gate_i": 1, "up_i": 1},
            divisible=("n", "width", *strides.split()),
            wide=("load", "store"),
        ),
        Case(
            op="stacked_swiglu",
            name="backward",
            kernel=kernels.swiglu_backward_kernel,
            signature=dict.fromkeys(("grad", "gate", "up", "grad_gate", "grad_up"), "*bf16")
            | integers(f"n width grad_m grad_n {strides}"),
            constants=tile | {"grad_i": 1, "gate_i": 1, "up_i": 1},
            divisible=("n", "width", "grad_m", "grad_n", *strides.split()),
            wide=("load", "store"),
        ),
    ]


def embedding() -> list[Case]:
    """Forward into bfloat16 from float32 masters, and the backward of the projection."""
    rows, block = _element_tile(TOKENS, WIDTH)
    tile = {"FEATURES": 2, "ROWS": rows, "BLOCK": block}
    strides, odd = "weight_m weight_v projection_m projection_f tokens_m", "inputs_m inputs_n"
    return [
        Case(
            op="stacked_embedding",
            name="forward",
            kernel=kernels.embedding_kernel,
            signature={"tokens": "*i64", "weight": "*fp32", "inputs": "*fp32", "projection": "*fp32", "out": "*bf16"}
            | integers(f"n h {strides} {odd}"),
            constants=tile | dict.fromkeys(("tokens_n", "weight_h", "inputs_f", "projection_h"), 1),
            divisible=("n", "h", "inputs_m", *strides.split()),
            wide=("load", "store"),
        ),
        Case(
            op="stacked_embedding",
            name="backward",
            kernel=kernels.embedding_backward_kernel,
            signature={"grad": "*bf16", "inputs": "*fp32", "partial": "*fp32"}
            | integers(f"n h features part_rows grad_m grad_n {odd}"),
            constants=tile | dict.fromkeys(("grad_h", "inputs_f"), 1),
            divisible=("n", "h", "inputs_m", "grad_m", "grad_n", "part_rows"),
            wide=("load", "store"),
        ),
    ]


def _none(name: str, axes: str) -> dict[str, int]:
    """Strides of a tensor left out."""
    return {f"{name}_{axis}": 0 for axis in axes}


CASES = [
    *rms_norm("", residual=False),
    *rms_norm(", residual", residual=True),
    *rms_norm(", residual, H = 8192", residual=True, width=8192, max_shared=32768),  # half of what AMD has
    *qk_norm_rope("", norm=True),
    *qk_norm_rope(", rotation alone", norm=False),
    *swiglu(),
    *embedding(),
    Case(
        op="stacked layers",
        name="sum of the parts",
        kernel=kernels.add_parts_kernel,
        signature={"partial": "*fp32", "first": "*bf16", "second": "*bf16", "parts": "i32", "columns": "i32"},
        constants={"BLOCK_P": 64, "BLOCK_C": 32},
        divisible=("parts", "columns"),
    ),
]
