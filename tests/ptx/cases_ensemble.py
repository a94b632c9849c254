"""The cases of the ensemble's ops."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

import asyppo_kernels as ops
from asyppo_kernels.agreement_masks import op as agreement_op
from asyppo_kernels.agreement_masks.reference import agreement_masks_reference
from asyppo_kernels.ensemble_gae.reference import ensemble_gae_reference
from asyppo_kernels.ensemble_value.reference import ensemble_value_reference
from tests.ptx.case import BF16, F16, F32, Call, Case, Inputs, Results, differentiate, leaf


def ensemble_value(
    k: int = 2,
    n: int = 37,
    h: int = 100,
    dtype: torch.dtype = BF16,
    weight_dtype: torch.dtype = BF16,
    bias: torch.dtype | None = BF16,
    layout: str = "knh",
    offset: int = 0,
    needs: str = "hidden weight bias",
) -> Call:
    """``layout``: the order of hidden's axes in memory; ``knh+``: with three more columns that are not used."""
    inputs = Inputs()
    shapes = {"knh": (k, n, h), "nkh": (n, k, h), "knh+": (k, n, h + 3), "hkn": (h, k, n)}
    hidden, weight = inputs.normal(*shapes[layout]).to(dtype), inputs.normal(k, h).to(weight_dtype)
    bias_values, upstream = None if bias is None else inputs.normal(k).to(bias), inputs.normal(k, n)

    def call(backend: str, cast: torch.dtype | None = None) -> Results:
        values = {"hidden": hidden, "weight": weight} | ({} if bias_values is None else {"bias": bias_values})
        leaves = {
            name: leaf(x, cast, 0 if name == "bias" else offset, grad=name in needs.split())
            for name, x in values.items()
        }
        x = leaves["hidden"]
        arranged = {
            "knh": lambda: x,
            "nkh": lambda: x.transpose(0, 1),
            "knh+": lambda: x[..., :h],
            "hkn": lambda: x.permute(1, 2, 0),
        }[layout]()
        if backend == "reference":
            out = ensemble_value_reference(arranged, leaves["weight"], leaves.get("bias"))
        else:
            out = ops.ensemble_value(arranged, leaves["weight"], leaves.get("bias"), backend=backend)
        results = {name: x.detach() for name, x in zip(("value", "mean", "std"), out, strict=True)}
        return results | differentiate([out[0]], [upstream], leaves)

    return call


def ensemble_gae(
    k: int = 2,
    b: int = 3,
    t: int = 37,
    dtype: torch.dtype = F32,
    lam_by_row: bool = False,
    holes: bool = True,
    time_first: bool = False,
    offset: int = 0,
) -> Call:
    """A row is masked as a whole, where there are ``holes``; a masked value is NaN, and not read."""
    inputs = Inputs()
    value, reward = inputs.normal(k, b, t).to(dtype), (0.1 * inputs.normal(b, t)).to(dtype)
    mask = inputs.uniform(b, t) < (0.8 if holes else 2)
    if holes:
        mask[0] = False
    lam = inputs.uniform(b) if lam_by_row else 0.95

    def call(backend: str, cast: torch.dtype | None = None) -> Results:
        v, r = (leaf(x, cast, offset, grad=False) for x in (value, reward))
        if time_first:
            v, r = v.permute(2, 0, 1).contiguous().permute(1, 2, 0), r.t().contiguous().t()
        v = v.masked_fill(~mask, float("nan"))
        numbers = {"gamma": 0.99, "value_lam": 0.97, "lam": lam.to(cast) if cast and torch.is_tensor(lam) else lam}
        if backend == "reference":
            out = ensemble_gae_reference(v, r, mask, **numbers)
        else:
            out = ops.ensemble_gae(v, r, mask, backend=backend, **numbers)
        return dict(zip(("advantage", "returns", "mean", "std"), out, strict=True))

    return call


def agreement_masks(
    n: int = 3000,
    kind: str = "random",
    dtype: torch.dtype = F32,
    fraction: float = 0.2,
    offset: int = 0,
    group: bool = False,
) -> Call:
    """``group``: the launches of a process group, its all-reduce left out."""
    inputs = Inputs()
    std = inputs.uniform(n)
    mask = inputs.uniform(n) < {"all": 2, "masked": -1}.get(kind, 0.7)
    if kind == "ties":
        std = inputs.integers(3, n).float()
    elif kind == "equal":
        std = torch.full((n,), 0.25)
    elif kind == "special":
        std[::7], std[1::7], std[2::7] = float("nan"), float("inf"), -0.0
    elif kind == "close":
        std = 0.5 + std * 1e-4
    std = std.to(dtype)

    def call(backend: str, cast: torch.dtype | None = None) -> Results:
        s, m = leaf(std, None, offset, grad=False), torch.zeros(n + offset, dtype=torch.bool)[offset:].copy_(mask)
        fractions = {"advantage_fraction": fraction, "entropy_fraction": fraction}
        if backend == "reference":
            out = agreement_masks_reference(s.float(), m, **fractions)
        elif backend == "triton" and group:
            with mock.patch.object(agreement_op, "_all_reduce", lambda x, *_: x):
                out = agreement_op._by_triton(s, m, 200_000, 200_000, object())
        else:
            out = ops.agreement_masks(s, m, backend=backend, **fractions)
        return dict(zip(("advantage_keep", "entropy_keep", "low", "high"), out, strict=True))

    return call


def value(name: str, quick: bool = False, programs: int | None = None, **arguments: Any) -> Case:
    """Of ``ensemble_value``; few ``programs`` take several steps each, as with many rows."""
    settings = {} if programs is None else {"ensemble_value.triton_form.PROGRAMS": programs}
    return Case("ensemble_value", name, ensemble_value, arguments, settings, quick)


def gae(name: str, quick: bool = False, **arguments: Any) -> Case:
    """Of ``ensemble_gae``."""
    return Case("ensemble_gae", name, ensemble_gae, arguments, {}, quick)


def masks(name: str, quick: bool = False, programs: int | None = None, **arguments: Any) -> Case:
    """Of ``agreement_masks``; likewise."""
    settings = {} if programs is None else {"agreement_masks.triton_form.PROGRAMS": programs}
    return Case("agreement_masks", name, agreement_masks, arguments, settings, quick)


CASES = [
    value("M = 2, H = 100", quick=True),
    value("M = 1, N = 1, no bias", k=1, n=1, bias=None),
    value("M = 5, fp32, H = 1,500", k=5, n=19, h=1500, dtype=F32, weight_dtype=F32, bias=F32),
    value("M = 2, H = 1,024", n=21, h=1024, quick=True),
    value("M = 2, fp16, [N, M, H]", dtype=F16, weight_dtype=F32, layout="nkh", h=96),
    value("M = 2, sliced rows at an odd address", layout="knh+", offset=1),
    value("M = 2, H = 96, rows 99 apart", layout="knh+", h=96, n=48, quick=True),
    value("M = 2, columns first", layout="hkn", n=9, h=40),
    value("M = 2, weight's gradient only", needs="weight"),
    value("M = 2, hidden's gradient only", needs="hidden"),
    value("M = 3, many parts", k=3, n=5000, h=8),
    value("M = 2, H = 1,100, several blocks a row, several steps a part", programs=8, n=85, h=1100, quick=True),
    gae("M = 2, T = 37", quick=True),
    gae("M = 1, T = 1, B = 1", k=1, b=1, t=1, holes=False),
    gae("M = 5, T = 100, B = 9", k=5, b=9, t=100),
    gae("M = 2, T = 128, bf16", b=5, t=128, dtype=BF16),
    gae("M = 2, T = 1,500, two blocks", t=1500, quick=True),
    gae("M = 2, T = 1,100, a lambda a row", t=1100, lam_by_row=True),
    gae("M = 2, T = 4,500, chunks", t=4500, quick=True),
    gae("M = 1, T = 9,001, chunks, a lambda a row", k=1, b=2, t=9001, lam_by_row=True),
    gae("M = 2, T = 200, time first", t=200, time_first=True),
    gae("M = 2, T = 203, at an odd address", t=203, offset=1),
    masks("n = 9,000, several blocks a program", programs=1, n=9000, quick=True),
    masks("n = 3,000"),
    masks("n = 1", n=1, kind="all"),
    masks("n = 3, all masked", n=3, kind="masked"),
    masks("n = 9,001, three values", n=9001, kind="ties"),
    masks("n = 9,001, one value", n=9001, kind="equal", quick=True),
    masks("n = 6,000, NaN, inf, -0", n=6000, kind="special"),
    masks("n = 6,001, bf16", n=6001, dtype=BF16),
    masks("n = 12,345, close together", n=12345, kind="close"),
    masks("n = 4,097, at an odd address", n=4097, offset=1),
    masks("n = 500, fractions of 0", n=500, fraction=0.0),
    masks("n = 21,000, several blocks, three values", programs=2, n=21000, kind="ties"),
    masks("n = 3,000, the launches of a group", group=True),
]
