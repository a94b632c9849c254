"""``linear_logprob`` against a float64 oracle written here from its formulas."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyppo_kernels import LinearLogprob, linear_logprob
from asyppo_kernels.linear_logprob import linear_logprob_reference
from tests.ops.policy_head import BACKENDS, DTYPES, MASTERS, ROUNDING, error, skip_in_interpreter

FLOAT32 = 2e-6  # of the largest element: a float32 sum of a few hundred terms

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def make(
    n: int, h: int, v: int, dtype: torch.dtype = torch.float32, *, scale: float = 1.0, ignored: float = 0.25
) -> dict[str, Tensor]:
    """Head, hidden states and targets, some of them -100."""
    target = torch.randint(v, (n,))
    target[torch.rand(n) < ignored] = -100
    return {
        "hidden": (torch.randn(n, h) * scale).to(dtype).requires_grad_(),
        "weight": torch.randn(v, h).to(dtype).requires_grad_(),
        "target": target,
        "bias": torch.randn(v).to(dtype).requires_grad_(),
    }


def oracle(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Row by row in float64: log p_j = z_j - max z - log sum exp(z - max z), H = -sum p log p."""
    logprob, entropy = [], []
    for x, t in zip(hidden, target.tolist(), strict=True):
        if t == -100:
            logprob.append(torch.zeros((), dtype=torch.float64))
            entropy.append(torch.zeros((), dtype=torch.float64))
            continue
        z = torch.stack([x @ w for w in weight])
        if bias is not None:
            z = z + bias
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / temperature
        z = z - z.max().detach()
        log_p = z - z.exp().sum().log()
        logprob.append(log_p[t])
        entropy.append(-(log_p.exp() * log_p).sum())
    return torch.stack(logprob), torch.stack(entropy)


def gradients(outputs: tuple[Tensor | None, ...], upstream: tuple[Tensor | None, ...], inputs: list[Tensor]) -> list:
    """D (sum of output * upstream), skipping what has no upstream gradient."""
    total = sum((o * u.to(o.dtype)).sum() for o, u in zip(outputs, upstream, strict=True) if u is not None)
    return list(torch.autograd.grad(total, inputs, retain_graph=True))


def rounded_logit_gradients(data: dict[str, Any], upstream: tuple[Tensor, ...], **options: Any) -> dict[str, Tensor]:
    """What a bfloat16 gradient of the logits, which is what the Triton form's products take, can add to the errors of
    the gradients of hidden, weight and bias, in float64: a rounding of every term of their sums, which may cancel."""
    data = {**data, "bias": torch.zeros(len(data["weight"])).double() if data["bias"] is None else data["bias"]}
    data["bias"] = data["bias"].detach().requires_grad_()
    rows = []
    for row in range(len(data["target"])):
        if data["target"][row] == -100:
            rows.append(torch.zeros_like(data["bias"]))
            continue
        one = {name: x[row : row + 1] if name in ("hidden", "target") else x for name, x in data.items()}
        # The bias is added to the logits: its gradient is theirs.
        rows += gradients(oracle(**one, **options), tuple(u[row : row + 1] for u in upstream), [data["bias"]])
    terms = torch.stack(rows).abs() * ROUNDING[torch.bfloat16]
    hidden, weight = (data[name].detach().abs() for name in ("hidden", "weight"))
    return {"hidden": terms @ weight, "weight": terms.T @ hidden, "bias": terms.sum(dim=0)}


def doubled(data: dict[str, Any], compute_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same numbers in float64, for the oracle and for gradients that nothing rounds; hidden and weight as the
    products take them."""
    rounded = {name: data[name].to(compute_dtype) for name in ("hidden", "weight") if compute_dtype is not None}
    return {
        name: rounded.get(name, x).detach().double().requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in data.items()
    }


def leaves(data: dict[str, Any]) -> list[Tensor]:
    """What gets gradients, in the order hidden, weight, bias."""
    return [x for x in data.values() if x is not None and x.requires_grad]


def check(
    data: dict[str, Any],
    backend: str,
    *,
    tolerance: float = FLOAT32,
    floor: float = 1e-30,
    compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> LinearLogprob:
    """Both outputs and all gradients are as near the oracle as float32, and a rounding to the input's dtype, allow."""
    out = linear_logprob(**data, **options, compute_dtype=compute_dtype, backend=backend)
    exact_data = doubled(data, compute_dtype)
    want = oracle(**exact_data, **options)
    for got, exact in zip(out, want, strict=True):
        assert got.dtype == torch.float32
        assert got.shape == exact.shape
        assert error(got, exact, floor) <= tolerance
    upstream = tuple(torch.randn(2, len(data["target"])).unbind())
    got_grads = gradients(out, upstream, leaves(data))
    if (data["target"] != -100).any():
        exact_grads = gradients(want, upstream, leaves(exact_data))
    else:
        exact_grads = [torch.zeros_like(x) for x in leaves(exact_data)]
    more: dict[str, Tensor] = {}
    if backend == "triton" and (compute_dtype or data["weight"].dtype) == torch.bfloat16:
        more = rounded_logit_gradients(exact_data, upstream, **options)
    names = [name for name, x in data.items() if x is not None and x.requires_grad]
    for name, got, exact in zip(names, got_grads, exact_grads, strict=True):
        assert got.dtype == data[name].dtype
        allowed = (4 * tolerance + ROUNDING[got.dtype]) * exact.abs().max().clamp(min=floor) if exact.numel() else 0.0
        assert ((got.double() - exact).abs() <= allowed + more.get(name, 0.0)).all()
    return out


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "h", "v"), [(1, 1, 1), (1, 7, 2), (5, 3, 127), (13, 8, 257), (6, 17, 64), (4, 5, 65)])
@pytest.mark.parametrize("bias", [True, False])
def test_matches_oracle_in_float32(backend: str, n: int, h: int, v: int, bias: bool) -> None:
    data = make(n, h, v)
    data["target"][0] = v - 1
    if not bias:
        data["bias"] = None
    check(data, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.6, None), (1.7, 5.0), (1.0, 30.0)])
def test_matches_oracle_in_every_dtype(
    backend: str, dtype: torch.dtype, temperature: float, softcap: float | None
) -> None:
    """The logits are accumulated in float32, so low-precision inputs cost no precision of log-prob and entropy."""
    check(make(9, 16, 101, dtype), backend, temperature=temperature, softcap=softcap)


@pytest.mark.usefixtures("blocks_of_eight_warps")
@pytest.mark.parametrize(
    ("dtype", "softcap"),
    [(torch.float32, None), (torch.bfloat16, None), pytest.param(torch.bfloat16, 15.0, marks=pytest.mark.slow)],
)
def test_matches_oracle_over_several_blocks_of_eight_warps(
    backend: str, dtype: torch.dtype, softcap: float | None
) -> None:
    check(make(6, 16, 20_011, dtype), backend, softcap=softcap)


@MASTERS
def test_masters_get_gradients_that_nothing_rounds(
    backend: str, compute_dtype: torch.dtype, masters: tuple[torch.dtype | None, torch.dtype | None]
) -> None:
    """Products are those of rounded inputs; a float32 master's gradient is as near the oracle as float32 allows."""
    data = make(9, 16, 101)
    for name, dtype in zip(("hidden", "weight"), masters, strict=True):
        data[name] = data[name].detach().to(dtype or compute_dtype).requires_grad_()
    check(data, backend, temperature=0.8, softcap=5.0, compute_dtype=compute_dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_rounded_inside_or_outside_compute_the_same(backend: str, dtype: torch.dtype) -> None:
    """To the bit, but that a gradient is not rounded, which without a compute dtype it is."""
    data = make(9, 16, 101)
    rounded = data | {k: data[k].detach().to(dtype).requires_grad_() for k in ("hidden", "weight")}
    upstream = tuple(torch.randn(2, 9).unbind())
    results = []
    for inputs, options in ((data, {"compute_dtype": dtype}), (rounded, {})):
        out = linear_logprob(**inputs, **options, backend=backend)
        results.append([*out, *gradients(out, upstream, leaves(inputs))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.to(b.dtype), b)
    for got, rounded_once in zip(results[0][2:4], results[1][2:4], strict=True):
        assert got.dtype == torch.float32
        assert not torch.equal(got, rounded_once.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_worse_than_plain_torch_of_the_same_precision(backend: str, dtype: torch.dtype) -> None:
    data = make(33, 64, 509, dtype, scale=0.5)
    exact_data = doubled(data)
    upstream = tuple(torch.randn(2, 33).unbind())
    results = []
    for outputs, inputs in (
        (linear_logprob(**data, backend=backend), data),
        (linear_logprob_reference(**data), data),
        (oracle(**exact_data), exact_data),
    ):
        results.append([*outputs, *gradients(outputs, upstream, leaves(inputs))])
    for got, plain, exact in zip(*results, strict=True):
        assert error(got, exact) <= error(plain, exact) + FLOAT32


def test_reference_is_the_definition(backend: str) -> None:
    data = doubled(make(11, 5, 23))
    options = {"temperature": 0.7, "softcap": 3.0}
    upstream = tuple(torch.randn(2, 11, dtype=torch.float64).unbind())
    results = []
    for function in (linear_logprob_reference, oracle):
        outputs = function(**data, **options)
        results.append([*outputs, *gradients(outputs, upstream, leaves(data))])
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
    assert linear_logprob_reference(**data, entropy=False).entropy is None


@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)])
def test_either_upstream_gradient_may_be_missing(backend: str, which: tuple[bool, bool]) -> None:
    """The entropy's own gradient, -p (log p + H), among them; every row has its own upstream gradient."""
    data = make(8, 6, 31)
    exact_data = doubled(data)
    upstream = tuple(torch.randn(8) * 10.0 ** torch.arange(-3, 5) if used else None for used in which)
    got = gradients(linear_logprob(**data, temperature=1.3, backend=backend), upstream, leaves(data))
    want = gradients(oracle(**exact_data, temperature=1.3), upstream, leaves(exact_data))
    for g, w in zip(got, want, strict=True):
        assert error(g, w) <= 4 * FLOAT32
    for g, w in zip(got[0], want[0], strict=True):  # row by row, since their scales differ
        assert error(g, w) <= 1e-5


def test_expanded_upstream_gradient(backend: str) -> None:
    data = make(7, 4, 11)
    exact_data = doubled(data)
    got = torch.autograd.grad(linear_logprob(**data, backend=backend).logprob.mean(), leaves(data))
    want = torch.autograd.grad(oracle(**exact_data)[0].mean(), leaves(exact_data))
    for g, w in zip(got, want, strict=True):
        assert error(g, w) <= 4 * FLOAT32


def test_without_entropy(backend: str) -> None:
    data = make(8, 6, 31)
    out, both = linear_logprob(**data, entropy=False, backend=backend), linear_logprob(**data, backend=backend)
    assert out.entropy is None
    assert torch.equal(out.logprob, both.logprob)
    weights = torch.randn(8)
    grads = [torch.autograd.grad((o.logprob * weights).sum(), data["weight"])[0] for o in (out, both)]
    assert torch.equal(*grads)


def test_non_contiguous_inputs(backend: str) -> None:
    hidden, weight = torch.randn(6, 14), torch.randn(8, 19)
    data = {
        "hidden": hidden.t()[::2].requires_grad_(),
        "weight": weight.t()[:, 1:7].requires_grad_(),
        "target": torch.randint(19, (14,))[::2],
        "bias": torch.randn(38)[::2].requires_grad_(),
    }
    check(data, backend)


def test_no_rows(backend: str) -> None:
    data = make(0, 3, 5)
    out = linear_logprob(**data, backend=backend)
    assert out.logprob.shape == out.entropy.shape == (0,)
    grads = torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), leaves(data))
    assert all((g == 0).all() for g in grads)


def test_all_rows_ignored(backend: str) -> None:
    data = make(6, 3, 5, ignored=1.0)
    with torch.no_grad():
        data["hidden"].fill_(torch.nan)
    out = linear_logprob(**data, backend=backend)
    assert (out.logprob == 0).all()
    assert (out.entropy == 0).all()
    grads = torch.autograd.grad(out.logprob.sum() + out.entropy.sum(), leaves(data))
    assert all((g == 0).all() for g in grads)


# --- numerical traps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-1e4, -300.0, 1e4])
@pytest.mark.parametrize("v", [2, 127, 129])
def test_logits_far_from_zero(backend: str, shift: float, v: int) -> None:
    """Nothing may count as exp(0) beside logits that are all very negative, and nothing may overflow."""
    data = make(5, 4, v)
    with torch.no_grad():
        data["bias"] += shift
    check(data, backend, tolerance=2.0**-23 * abs(shift))  # an ulp of the logits


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 10.0, 300.0])
def test_logprob_is_never_positive(backend: str, logits_dtype: torch.dtype, scale: float) -> None:
    data = make(64, 16, 83, torch.bfloat16, scale=scale, ignored=0.0)
    data["target"] = (data["hidden"].float() @ data["weight"].float().T + data["bias"].float()).argmax(1)
    out = linear_logprob(**data, logits_dtype=logits_dtype, backend=backend)
    assert (out.logprob <= 0).all()
    assert (out.entropy >= 0).all()
    assert (out.entropy <= torch.tensor(83.0).log() + 1e-5).all()


def test_entropy_keeps_its_digits_when_it_is_small(backend: str) -> None:
    """The plain lse - sum p z loses four digits here: logits near 1000, entropy near 1e-3."""
    data = make(16, 4, 50, ignored=0.0)
    with torch.no_grad():
        data["hidden"].zero_()
        data["bias"].zero_()
        data["bias"][7] = 1024.0
        data["bias"][8] = 1016.0
        data["bias"][9] = 1015.0
    data["target"][:] = 7
    want = oracle(**doubled(data))
    out = linear_logprob(**data, backend=backend)
    # The log of a sum just above 1 has the rounding of that sum, half a float32 step at 1.
    torch.testing.assert_close(out.entropy.double(), want[1], rtol=1e-5, atol=2**-24)
    torch.testing.assert_close(out.logprob.double(), want[0], rtol=1e-4, atol=0)


def test_bias_of_minus_infinity_bans_a_token(backend: str) -> None:
    data = make(6, 4, 9, ignored=0.0)
    data["target"].clamp_(min=1)
    cut = doubled(data)
    with torch.no_grad():
        data["bias"][0] = -torch.inf
    out = linear_logprob(**data, backend=backend)
    want = oracle(cut["hidden"], cut["weight"][1:], cut["target"] - 1, bias=cut["bias"][1:])
    assert error(out.logprob, want[0]) <= FLOAT32
    assert error(out.entropy, want[1]) <= FLOAT32
    grads = torch.autograd.grad((out.logprob + out.entropy).sum(), leaves(data))
    assert all(g.isfinite().all() for g in grads)
    assert grads[2][0] == 0


@pytest.mark.parametrize("target", [0, 1, 2])
def test_wide_logits_under_a_softcap(backend: str, target: int) -> None:
    """A target 350 nats below the maximum still has the slope of its own logit."""
    data = make(1, 1, 4, ignored=0.0)
    with torch.no_grad():
        data["hidden"].fill_(1.0)
        data["weight"].zero_()
        data["bias"].copy_(torch.tensor([-60.0, -45.0, 20.0, 60.0]))
    data["target"][:] = target
    # Where products and sums are fused, the gap of the maximum to itself is a rounding; then the entropy, which is all
    # but 0, has the rounding of a sum near 1.
    check(data, backend, temperature=0.2, softcap=50.0, floor=2**-24 / FLOAT32)


def test_bf16_logits(backend: str) -> None:
    """Error no larger than that of plain torch on logits rounded to bfloat16; log-prob and entropy stay consistent."""
    data = make(32, 64, 307, torch.bfloat16, scale=0.4, ignored=0.0)
    exact_data = doubled(data)
    z = (data["hidden"].float() @ data["weight"].float().T).bfloat16().float() + data["bias"].float()
    log_p = z.log_softmax(1)
    plain = log_p.gather(1, data["target"][:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)
    upstream = tuple(torch.randn(2, 32).unbind())
    results = []
    for outputs, inputs in (
        (linear_logprob(**data, logits_dtype=torch.bfloat16, backend=backend), data),
        (plain, data),
        (oracle(**exact_data), exact_data),
    ):
        results.append([*outputs, *gradients(outputs, upstream, leaves(inputs))])
    for got, naive, exact in zip(*results, strict=True):
        assert error(got, exact) <= error(naive, exact) + 2.0**-9
    assert not torch.equal(results[0][0], linear_logprob(**data, backend=backend).logprob)


def test_many_rows_in_one_dimension(backend: str) -> None:
    """More than a grid dimension's 65,535."""
    skip_in_interpreter(backend)
    n = 70_001
    hidden, weight = torch.randn(n, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    target = torch.randint(3, (n,))
    out = linear_logprob(hidden, weight, target, backend=backend)
    plain = linear_logprob_reference(hidden.double(), weight.double(), target)
    torch.testing.assert_close(out.logprob.double(), plain.logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), plain.entropy, rtol=1e-5, atol=1e-5)
    got, want = (torch.autograd.grad(o.logprob[65_530:].sum() + o.entropy[-3:].sum(), hidden)[0] for o in (out, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_more_logits_than_int32_counts(backend: str) -> None:
    """Rows beyond logit number 2^31, which only 64-bit offsets reach."""
    skip_in_interpreter(backend)
    n, v = 65_600, 32_771
    assert n * v > 2**31
    hidden, weight, target = torch.randn(n, 1), torch.randn(v, 1), torch.randint(v, (n,))
    hidden.requires_grad_()
    out = linear_logprob(hidden, weight, target, backend=backend)
    tail = slice(n - 20, n)
    exact = hidden[tail].detach().double().requires_grad_()
    want = oracle(exact, weight.double(), target[tail])
    assert error(out.logprob[tail], want[0]) <= 10 * FLOAT32
    assert error(out.entropy[tail], want[1]) <= 10 * FLOAT32
    got = torch.autograd.grad(out.logprob[tail].sum(), hidden)[0][tail]
    assert error(got, torch.autograd.grad(want[0].sum(), exact)[0]) <= 1e-4


# --- what is read, and what is computed -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_rows_are_not_read(backend: str, dtype: torch.dtype) -> None:
    """Whatever they hold, NaN and upstream gradients included, nothing changes, to the bit."""
    clean = make(12, 5, 29, dtype)
    ignored = clean["target"] == -100
    assert ignored.any()
    dirty = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in clean.items()}
    with torch.no_grad():
        dirty["hidden"][ignored] = torch.nan
    names = ("hidden", "weight", "bias")
    upstream = torch.randn(2, 12)
    outs = [linear_logprob(**data, backend=backend) for data in (clean, dirty)]
    wild = upstream.where(~ignored, torch.nan)
    grads = [
        torch.autograd.grad([*o], [d[k] for k in names], [*u])
        for o, d, u in zip(outs, (clean, dirty), (upstream, wild), strict=True)
    ]
    for a, b in zip([*outs[0], *grads[0]], [*outs[1], *grads[1]], strict=True):
        assert torch.equal(a, b)
    assert (outs[1].logprob[ignored] == 0).all()
    assert (outs[1].entropy[ignored] == 0).all()
    assert (grads[1][0][ignored] == 0).all()


def test_arithmetic_is_that_of_the_rows_that_count(backend: str, count_gemms: Callable[..., list[int]]) -> None:
    """One GEMM forward, three backward, over the rows with a target; rows without an upstream gradient skip those.

    Two backward where the logits were kept, which only a CPU does.
    """
    n, h, v = 32, 8, 61
    data = make(n, h, v, ignored=0.5)
    rows = int((data["target"] != -100).sum())
    assert 0 < rows < n
    result: list[LinearLogprob] = []
    assert sum(count_gemms(lambda: result.append(linear_logprob(**data, backend=backend)))) == rows * h * v
    upstream = torch.ones(n)
    gemms = 2 if backend == "torch" and not data["hidden"].is_cuda else 3
    assert sum(count_gemms(lambda: result[0].logprob.backward(upstream, retain_graph=True))) == gemms * rows * h * v
    upstream[data["target"].argmax()] = 0.0
    assert sum(count_gemms(lambda: result[0].logprob.backward(upstream))) == gemms * (rows - 1) * h * v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        ({}, 0.0),
        ({"temperature": 0.7, "softcap": 4.0}, 0.3),
        ({"entropy": False}, 0.3),
        pytest.param({}, 0.3, marks=pytest.mark.slow),
        pytest.param({"temperature": 0.7, "softcap": 4.0}, 0.0, marks=pytest.mark.slow),
        pytest.param({"entropy": False}, 0.0, marks=pytest.mark.slow),
    ],
)
def test_logits_kept_or_computed_again_give_the_same(
    backend: str, dtype: torch.dtype, options: dict[str, Any], ignored: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all rows and of those that an upstream gradient moves, and twice. To the bit, but for the exponentials at the
    end of a tile, which torch computes one by one and a rounding off: other rows, other tiles."""
    if backend == "triton":
        pytest.skip("always computes them again")
    data = make(24, 8, 61, dtype, ignored=ignored)
    every, some = torch.randn(24), torch.randn(24).where(torch.rand(24) < 0.5, 0.0)
    results = []
    for kept_bytes in (None, 0):
        if kept_bytes is not None:
            monkeypatch.setattr(importlib.import_module("asyppo_kernels.linear_logprob.op"), "KEPT_LOGITS_BYTES", 0)
        out = linear_logprob(**data, **options, backend=backend)
        results.append([out.logprob])
        for upstream in (every, some, every):
            total = (out.logprob * upstream).sum() + (0.0 if out.entropy is None else (out.entropy * upstream).sum())
            results[-1] += torch.autograd.grad(total, leaves(data), retain_graph=True)
    leaves_of = len(leaves(data))
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if leaves_of < i <= 2 * leaves_of:
            torch.testing.assert_close(a, b, rtol=4 * ROUNDING[a.dtype], atol=4 * FLOAT32)
        else:
            assert torch.equal(a, b)
    first, last = results[0][1 : 1 + leaves_of], results[0][1 + 2 * leaves_of :]
    assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))


@pytest.mark.parametrize(("grad", "rows", "kept"), [(True, 8, 8), (False, 8, 0), (True, 9, 0)])
def test_a_cpu_keeps_small_logits_where_a_gradient_needs_them(
    backend: str, grad: bool, rows: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the graph holds is all there is of them."""
    op = importlib.import_module("asyppo_kernels.linear_logprob.op")
    monkeypatch.setattr(op, "KEPT_LOGITS_BYTES", 4 * 8 * 61)
    data = make(rows, 4, 61)
    packed: list[Tensor] = []
    with (
        torch.set_grad_enabled(grad),
        torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x),
    ):
        linear_logprob(**data, backend=backend)
    cpu = backend == "torch" and not data["hidden"].is_cuda
    assert sum(x.shape == (rows, 61) for x in packed) == (1 if kept and cpu else 0)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_gradients_only_where_needed(
    backend: str, needs: tuple[bool, bool, bool], count_gemms: Callable[..., list[int]]
) -> None:
    n, h, v = 8, 4, 37
    data = make(n, h, v, ignored=0.0)
    names = ("hidden", "weight", "bias")
    want = torch.autograd.grad(linear_logprob(**data, backend=backend).logprob.sum(), [data[k] for k in names])
    for name, need in zip(names, needs, strict=True):
        data[name].requires_grad_(need)
    out = linear_logprob(**data, backend=backend)
    assert out.logprob.requires_grad == any(needs)
    if any(needs):
        recomputed = backend == "triton" or data["hidden"].is_cuda
        n_gemms = recomputed + needs[0] + needs[1]
        assert sum(count_gemms(lambda: out.logprob.sum().backward())) == n_gemms * n * h * v
    for name, need, grad in zip(names, needs, want, strict=True):
        assert (data[name].grad is not None) == need
        if need:
            torch.testing.assert_close(data[name].grad, grad)


def test_no_grad(backend: str) -> None:
    data = make(8, 4, 37)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = linear_logprob(**data, backend=backend)
        assert not out.logprob.requires_grad
        assert torch.equal(out.logprob, linear_logprob(**data, backend=backend).logprob)


def test_logits_never_exist_at_once(
    backend: str, count_gemms: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked, the op computes the same."""
    data = make(50, 8, 211)
    upstream = tuple(torch.randn(2, 50).unbind())
    whole = linear_logprob(**data, temperature=0.8, softcap=4.0, backend=backend)
    whole_grads = gradients(whole, upstream, leaves(data))
    head = importlib.import_module("asyppo_kernels._policy_head")
    monkeypatch.setattr(importlib.import_module("asyppo_kernels.linear_logprob.op"), "KEPT_LOGITS_BYTES", 0)
    for name in ("CPU_WORKSPACE_BYTES", "GPU_WORKSPACE_BYTES"):
        monkeypatch.setattr(head, name, 12 * 211 * 7)
    chunked: list[LinearLogprob] = []
    forward = count_gemms(lambda: chunked.append(linear_logprob(**data, temperature=0.8, softcap=4.0, backend=backend)))
    assert len(forward) > 1
    assert max(forward) <= 3 * 7 * 8 * 211
    grads: list[list[Tensor]] = []
    backward = count_gemms(lambda: grads.append(gradients(chunked[0], upstream, leaves(data))))
    assert max(backward) <= 3 * 7 * 8 * 211  # 12 bytes an element may be one block of logits or three
    for a, b in zip([*whole, *whole_grads], [*chunked[0], *grads[0]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_hidden_gradient_accumulates_in_float32(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a hundred slices of the vocabulary, a bfloat16 sum would be off by tens of roundings."""
    data = make(4, 8, 4001, torch.bfloat16, ignored=0.0)
    head = importlib.import_module("asyppo_kernels._policy_head")
    monkeypatch.setattr(importlib.import_module("asyppo_kernels.linear_logprob.op"), "KEPT_LOGITS_BYTES", 0)
    for name in ("CPU_WORKSPACE_BYTES", "GPU_WORKSPACE_BYTES"):
        monkeypatch.setattr(head, name, 12 * 4 * 16)
    with torch.no_grad():
        data["weight"].abs_()  # so that the slices add up
    exact_data = doubled(data)
    got = torch.autograd.grad(linear_logprob(**data, backend=backend).entropy.sum(), data["hidden"])[0]
    want = torch.autograd.grad(linear_logprob_reference(**exact_data).entropy.sum(), exact_data["hidden"])[0]
    assert error(got, want) <= ROUNDING[torch.bfloat16] * (2 if backend == "triton" else 1) + 4 * FLOAT32


def test_deterministic_and_inputs_unchanged(backend: str) -> None:
    data = make(40, 16, 301)
    before = {k: v.detach().clone() for k, v in data.items()}
    upstream = tuple(torch.randn(2, 40).unbind())
    runs = []
    for _ in range(2):
        out = linear_logprob(**data, backend=backend)
        runs.append([*out, *gradients(out, upstream, leaves(data)), *gradients(out, upstream, leaves(data))])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    for name, x in before.items():
        assert torch.equal(x, data[name])


def test_autocast_does_not_reach_inside(backend: str) -> None:
    data = make(9, 16, 101)
    want = linear_logprob(**data, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprob(**data, backend=backend)
        grad = torch.autograd.grad(out.logprob.sum(), data["hidden"])[0]
    assert torch.equal(out.logprob, want.logprob)
    assert torch.equal(grad, torch.autograd.grad(want.logprob.sum(), data["hidden"])[0])


def test_second_derivative_is_refused(backend: str) -> None:
    data = make(4, 3, 5)
    (grad,) = torch.autograd.grad(
        linear_logprob(**data, backend=backend).logprob.sum(), data["hidden"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


# --- torch.library and torch.compile ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "entropy", "softcap"), [(True, True, 4.0), (False, False, None)])
def test_opcheck(backend: str, dtype: torch.dtype, bias: bool, entropy: bool, softcap: float | None) -> None:
    data = make(6, 4, 11, dtype)
    compute_dtype = torch.bfloat16 if bias else dtype
    b = data["bias"] if bias else None
    head = (1.3, softcap)
    inputs = (data["hidden"], data["weight"], data["target"], b)
    torch.library.opcheck(
        torch.ops.asyppo.linear_logprob.default,
        (*inputs, *head, entropy, torch.float32, compute_dtype, backend, bias and backend == "torch"),
    )
    inputs = tuple(None if x is None else x.detach() for x in inputs)
    rows = torch.rand(4, 6).unbind()
    kept = -torch.rand(6 if bias and backend == "torch" else 0, 11)
    grads = (rows[3], torch.rand(6) if entropy else None)
    torch.library.opcheck(
        torch.ops.asyppo.linear_logprob_backward.default,
        (*inputs, *rows[:3], kept, *grads, *head, torch.float32, compute_dtype, backend, True, entropy, bias),
    )


@pytest.mark.parametrize(("dynamic", "compute_dtype"), [(False, None), (True, None), (False, torch.bfloat16)])
def test_compiles_without_graph_breaks(backend: str, dynamic: bool, compute_dtype: torch.dtype | None) -> None:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
        options = {"temperature": 0.9, "softcap": 20.0, "compute_dtype": compute_dtype}
        out = linear_logprob(hidden * 2, weight, target, bias=bias, **options, backend=backend)
        return (out.logprob * torch.arange(len(target))).sum() + out.entropy.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (6, 9) if dynamic else (6,):
        data = make(n, 4, 11)
        want, got = loss(**data), compiled(**data)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, leaves(data)), torch.autograd.grad(want, leaves(data)))


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(4)}, r"hidden: got shape \[4\], needs \[N, H\]"),
        ({"hidden": torch.randn(4, 3, dtype=torch.float64)}, "hidden: got dtype torch.float64, needs"),
        ({"weight": torch.randn(5, 2)}, r"weight: got shape \[5, 2\], needs \[V, H\] = \[V, 3\]"),
        ({"weight": torch.randn(5, 3).bfloat16()}, "weight: got dtype torch.bfloat16, needs torch.float32"),
        ({"weight": torch.randn(0, 3)}, r"weight: got shape \[0, 3\], needs"),
        ({"weight": torch.randn(5, 3, device="meta")}, "weight: got device meta, needs c"),
        ({"weight": [1.0]}, "weight: got list, needs a tensor"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target: got shape \[3\], needs \[N\] = \[4\]"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, "target: got dtype torch.int32, needs torch.int64"),
        ({"bias": torch.zeros(4)}, r"bias: got shape \[4\], needs \[V\] = \[5\]"),
        ({"bias": torch.zeros(5, dtype=torch.int64)}, "bias: got dtype"),
        ({"temperature": 0.0}, "temperature: got 0.0, needs a number above 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"softcap": -1.0}, "softcap: got -1.0, needs a number above 0"),
        ({"softcap": 0}, "softcap: got 0, needs"),
        ({"compute_dtype": torch.float64}, "compute_dtype: got torch.float64, needs torch.float32 or"),
        (
            {"compute_dtype": torch.float16, "hidden": torch.randn(4, 3).bfloat16()},
            "hidden: got dtype torch.bfloat16, needs torch.float16 or torch.float32",
        ),
        (
            {"compute_dtype": torch.float32, "weight": torch.randn(5, 3).bfloat16()},
            "weight: got dtype torch.bfloat16, needs torch.float32$",
        ),
        ({"logits_dtype": torch.float16}, "logits_dtype: got torch.float16, needs"),
        ({"backend": "cuda"}, "backend: got 'cuda', needs"),
    ],
)
def test_errors_name_the_argument(backend: str, change: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.randn(4, 3),
        "weight": torch.randn(5, 3),
        "target": torch.zeros(4, dtype=torch.int64),
        "backend": backend,
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**arguments, **change})


def test_dtensor_is_refused_with_advice(backend: str) -> None:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.tensor import DeviceMesh, distribute_tensor

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        weight = distribute_tensor(torch.randn(5, 3), DeviceMesh("cpu", [0]))
        with pytest.raises(ValueError, match=r"weight: got a DTensor.*full_tensor"):
            linear_logprob(torch.randn(4, 3), weight, torch.zeros(4, dtype=torch.int64), backend=backend)
    finally:
        distributed.destroy_process_group()


# --- anything ---------------------------------------------------------------------------------------------------------


def check_anything(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31), label="seed"))
    n, h, v = draw(st.integers(0, 12)), draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 31, 32, 33, 127]))
    dtype = draw(st.sampled_from(DTYPES))
    inputs = make(n, h, v, dtype, ignored=draw(st.sampled_from([0.0, 0.5, 1.0])))
    if draw(st.booleans(), label="bias"):
        inputs["bias"] = None
    options = {
        "temperature": draw(st.sampled_from([0.3, 1.0, 2.5])),
        "softcap": draw(st.sampled_from([None, 3.0, 50.0])),
        "compute_dtype": draw(st.sampled_from([None, dtype, *(DTYPES if dtype == torch.float32 else [])])),
    }
    if n:
        # Where a distribution is all but one-hot, log-prob and gradients are differences of numbers near 1.
        check(inputs, backend, tolerance=1e-5, floor=1.0, **options)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_anything(backend: str, data: st.DataObject) -> None:
    check_anything(backend, data)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_anything_at_length(backend: str, data: st.DataObject) -> None:
    check_anything(backend, data)
