"""The cases of the stacked layers."""

from __future__ import annotations

from typing import Any

import torch

import asyppo_kernels as ops
from asyppo_kernels.stacked_layers import reference
from tests.ptx.case import BF16, F16, F32, Call, Case, Inputs, Results, differentiate, leaf


def stacked_rms_norm(
    m: int = 2,
    n: int = 7,
    h: int = 100,
    dtype: torch.dtype = BF16,
    weight_dtype: torch.dtype = BF16,
    residual: torch.dtype | None = None,
    tokens_first: bool = False,
    needs: str = "x weight residual",
    use_summed: bool = True,
    offset: int = 0,
) -> Call:
    """``tokens_first``: x lies in memory as [N, M, H]."""
    inputs = Inputs()
    values = {"x": inputs.normal(m, n, h).to(dtype), "weight": inputs.normal(m, h).to(weight_dtype)}
    if residual is not None:
        values["residual"] = inputs.normal(m, n, h).to(residual)
    upstream = [inputs.normal(m, n, h), inputs.normal(m, n, h)]

    def call(backend: str, cast: torch.dtype | None = None) -> Results:
        leaves = {
            name: leaf(x, cast, offset if name == "x" else 0, grad=name in needs.split()) for name, x in values.items()
        }
        x, weight, other = leaves["x"], leaves["weight"], leaves.get("residual")
        if tokens_first:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        if backend == "reference":
            out = reference.stacked_rms_norm_reference(x, weight, residual=other)
        else:
            out = ops.stacked_rms_norm(x, weight, residual=other, backend=backend)
        used = list(out) if use_summed else [out[0]]
        results = {"normed": out[0].detach(), "summed": out[1].detach()}
        return results | differentiate(used, upstream[: len(used)], leaves)

    return call


def stacked_qk_norm_rope(
    m: int = 2,
    n: int = 5,
    q_heads: int = 4,
    k_heads: int = 2,
    d: int = 32,
    dtype: torch.dtype = BF16,
    weight_dtype: torch.dtype = BF16,
    angle_dtype: torch.dtype | None = None,
    weights: str = "q_weight k_weight",
    angles_by_critic: bool = False,
    sliced: bool = False,
    frozen: bool = False,
) -> Call:
    """``sliced``: q and k lie in one projection, with v. ``frozen``: the weights want no gradient."""
    inputs = Inputs()
    projection = inputs.normal(m, n, q_heads + 2 * k_heads, d).to(dtype)
    angle = inputs.normal(*((m, n, d) if angles_by_critic else (n, d)))
    cos, sin = (x.to(angle_dtype or dtype) for x in (angle.cos(), angle.sin()))
    weight_values = {name: inputs.normal(m, d).to(weight_dtype) for name in weights.split()}
    upstream = [inputs.normal(m, n, q_heads, d), inputs.normal(m, n, k_heads, d)]

    def call(backend: str, cast: torch.dtype | None = None) -> Results:
        leaves = {"projection": leaf(projection, cast)}
        leaves |= {name: leaf(x, cast, grad=not frozen) for name, x in weight_values.items()}
        q, k = leaves["projection"][:, :, :q_heads], leaves["projection"][:, :, q_heads : q_heads + k_heads]
        if not sliced:
            q, k = q.contiguous(), k.contiguous()
        arguments = [q, k, cos.to(cast or cos.dtype), sin.to(cast or sin.dtype)]
        named = {name: leaves[name] for name in weight_values}
        if backend == "reference":
            out = reference.stacked_qk_norm_rope_reference(*arguments, **{"q_weight": None, "k_weight": None} | named)
        else:
            out = ops.stacked_qk_norm_rope(*arguments, **named, backend=backend)
        return {"q": out[0].detach(), "k": out[1].detach()} | differentiate(list(out), upstream, leaves)

    return call


def stacked_swiglu(m: int = 2, n: int = 7, width: int = 100, dtype: torch.dtype = BF16, halves: bool = True) -> Call:
    """``halves``: of one tensor."""
    inputs = Inputs()
    both, upstream = (3 * inputs.normal(m, n, 2 * width)).to(dtype), inputs.normal(m, n, width)

    def call(backend: str, cast: torch.dtype | None = None) -> Results:
        leaves = {"both": leaf(both, cast)}
        gate, up = leaves["both"].chunk(2, dim=-1)
        if not halves:
            gate, up = gate.contiguous(), up.contiguous()
        if backend == "reference":
            out = reference.stacked_swiglu_reference(gate, up)
        else:
            out = ops.stacked_swiglu(gate, up, backend=backend)
        return {"out": out.detach()} | differentiate([out], [upstream], leaves)

    return call


def stacked_embedding(
    m: int = 2,
    n: int = 7,
    h: int = 100,
    v: int = 11,
    features: int = 2,
    dtype: torch.dtype = F32,
    projection_dtype: torch.dtype = F32,
    out: torch.dtype = BF16,
    shared: bool = False,
    padding_idx: int | None = None,
) -> Call:
    """``shared``: one table, and tokens and inputs that all critics read; the table wants no gradient."""
    inputs = Inputs()
    first = 1 if shared else m
    tokens, read = inputs.integers(v, first, n), inputs.normal(first, n, features)
    values = {
        "weight": inputs.normal(first, v, h).to(dtype),
        "projection": inputs.normal(m, features, h).to(projection_dtype),
    }
    upstream = inputs.normal(m, n, h)

    def call(backend: str, cast: torch.dtype | None = None) -> Results:
        leaves = {name: leaf(x, cast, grad=name == "projection" or not shared) for name, x in values.items()}
        weight, projection = leaves["weight"], leaves["projection"]
        if backend == "reference":
            found = reference.stacked_embedding_reference(tokens, weight, read, projection, padding_idx=padding_idx)
        else:
            options: dict[str, Any] = {"padding_idx": padding_idx, "dtype": out, "backend": backend}
            found = ops.stacked_embedding(tokens, weight, read, projection, **options)
        return {"out": found.detach()} | differentiate([found], [upstream], leaves)

    return call


PROGRAMS = "stacked_layers.triton_form.PROGRAMS"  # few take several steps each, as with many tokens


def rms(name: str, quick: bool = False, programs: int | None = None, **arguments: Any) -> Case:
    """Of ``stacked_rms_norm``."""
    settings = {} if programs is None else {PROGRAMS: programs}
    return Case("stacked_rms_norm", name, stacked_rms_norm, arguments, settings, quick)


def rope(name: str, quick: bool = False, programs: int | None = None, **arguments: Any) -> Case:
    """Of ``stacked_qk_norm_rope``."""
    settings = {} if programs is None else {PROGRAMS: programs}
    return Case("stacked_qk_norm_rope", name, stacked_qk_norm_rope, arguments, settings, quick)


def swiglu(name: str, quick: bool = False, **arguments: Any) -> Case:
    """Of ``stacked_swiglu``."""
    return Case("stacked_swiglu", name, stacked_swiglu, arguments, {}, quick)


def embedding(name: str, quick: bool = False, programs: int | None = None, **arguments: Any) -> Case:
    """Of ``stacked_embedding``."""
    settings = {} if programs is None else {PROGRAMS: programs}
    return Case("stacked_embedding", name, stacked_embedding, arguments, settings, quick)


CASES = [
    rms("H = 100, several steps a part", programs=4, n=40, quick=True),
    rms("H = 100"),
    rms("H = 1,024, residual", n=9, h=1024, residual=BF16),
    rms(
        "H = 1,500, fp32, residual, summed unused",
        m=3,
        h=1500,
        dtype=F32,
        weight_dtype=F32,
        residual=F32,
        use_summed=False,
    ),
    rms("H = 3,000, fp32 weight and residual", m=1, n=5, h=3000, weight_dtype=F32, residual=F32),
    rms("H = 8,192, 16 warps", m=1, n=3, h=8192, residual=BF16),
    rms("H = 96, [N, M, H]", h=96, tokens_first=True, residual=BF16),
    rms("H = 128, fp16, no weight's gradient", h=128, dtype=F16, weight_dtype=F16, needs="x"),
    rms("H = 128, weight's gradient only", h=128, needs="weight"),
    rms("H = 99, at an odd address", h=99, offset=1),
    rms("H = 1,000, residual, several steps a part", programs=4, n=21, h=1000, residual=BF16, quick=True),
    rms("H = 50, several steps a part", programs=4, n=150, h=50),
    rope("4 and 2 heads of 32", quick=True),
    rope("16 and 8 heads of 128, sliced", n=3, q_heads=16, k_heads=8, d=128, sliced=True),
    rope(
        "5 and 3 heads of 6, fp32, angles of each critic",
        q_heads=5,
        k_heads=3,
        d=6,
        dtype=F32,
        weight_dtype=F32,
        angles_by_critic=True,
    ),
    rope("rotation alone", weights="", d=64, sliced=True, quick=True),
    rope("weight of q only, fp32 angles", weights="q_weight", weight_dtype=F32, angle_dtype=F32),
    rope("weights without a gradient", frozen=True),
    rope("40 and 8 heads of 128, fp16", m=1, n=2, q_heads=40, k_heads=8, d=128, dtype=F16, weight_dtype=F16),
    rope("16 and 8 heads of 128, several tokens a part", programs=4, n=7, q_heads=16, k_heads=8, d=128, sliced=True),
    rope("3 and 1 heads of 10, several tokens a part", programs=4, n=9, q_heads=3, k_heads=1, d=10, quick=True),
    swiglu("I = 100, halves", quick=True),
    swiglu("I = 1,536, halves", n=5, width=1536),
    swiglu("I = 77, fp32", width=77, dtype=F32, halves=False),
    swiglu("I = 3,072, fp16", n=3, width=3072, dtype=F16),
    embedding("H = 100, several steps a part", programs=4, n=90, quick=True),
    embedding("H = 1,500, bf16, a padding token", m=3, h=1500, dtype=BF16, projection_dtype=BF16, padding_idx=4),
    embedding("H = 1,024, one table", n=9, h=1024, shared=True),
    embedding("H = 48, three features, fp32", h=48, features=3, out=F32),
    embedding("H = 96, one feature, fp16", h=96, features=1, dtype=F16, out=F16),
]
