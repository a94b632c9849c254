"""``ensemble_value`` against a float64 oracle written here from its formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyppo_kernels import EnsembleValue, ensemble_value
from asyppo_kernels._args import INTERPRETED
from asyppo_kernels.ensemble_value.op import _backward_op, _forward_op
from asyppo_kernels.ensemble_value.reference import ensemble_value_reference

BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place, relative: what rounding the exact result once costs.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def f64(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def make(k: int, n: int, h: int, dtype: torch.dtype = torch.float32, *, bias: bool = True):
    hidden = torch.randn(k, n, h).to(dtype).requires_grad_()
    weight = torch.randn(k, h).to(dtype).requires_grad_()
    return hidden, weight, torch.randn(k).to(dtype).requires_grad_() if bias else None


def oracle_value(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> np.ndarray:
    value = np.stack([h @ w for h, w in zip(f64(hidden), f64(weight), strict=True)])
    return value if bias is None else value + f64(bias)[:, None]


def oracle_grads(grad: np.ndarray, hidden: Tensor, weight: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    h, w = f64(hidden), f64(weight)
    return grad[:, :, None] * w[:, None, :], (grad[:, :, None] * h).sum(1), grad.sum(1)


def check_forward(out: EnsembleValue, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    assert [x.dtype for x in out] == [torch.float32] * 3
    k, n, width = hidden.shape
    assert out.value.shape == (k, n)
    assert out.mean.shape == out.std.shape == (n,)
    value = oracle_value(hidden, weight, bias)
    # A float32 dot product errs by at most about width ulps of the sum of magnitudes; far less in practice.
    magnitude = (np.abs(f64(hidden)) * np.abs(f64(weight))[:, None]).sum(-1) + 1
    tolerance = 2.0**-24 * (4 + width**0.5) * magnitude
    assert (np.abs(f64(out.value) - value) <= tolerance).all()
    # The statistics are those of the values that came out.
    own = f64(out.value)
    scale = np.abs(own).max(initial=1)
    np.testing.assert_allclose(f64(out.mean), own.mean(0), rtol=0, atol=2.0**-22 * scale)
    np.testing.assert_allclose(f64(out.std), own.std(0), rtol=2.0**-20, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("k", "n", "h"), [(1, 1, 1), (1, 7, 33), (2, 64, 128), (4, 65, 127), (5, 3, 300), (2, 0, 8)])
def test_forward_and_gradients_match_the_oracle(backend, k, n, h, bias, dtype):
    hidden, weight, b = make(k, n, h, dtype, bias=bias)
    out = ensemble_value(hidden, weight, b, backend=backend)
    check_forward(out, hidden, weight, b)
    assert not out.mean.requires_grad
    assert not out.std.requires_grad

    upstream = torch.randn(k, n)
    inputs = [hidden, weight] + ([b] if bias else [])
    grads = torch.autograd.grad(out.value, inputs, upstream)
    magnitudes = oracle_grads(np.abs(f64(upstream)), hidden.detach().abs(), weight.detach().abs())
    for x, got, want, magnitude in zip(
        inputs, grads, oracle_grads(f64(upstream), hidden, weight), magnitudes, strict=False
    ):
        assert got.dtype == x.dtype
        assert got.shape == x.shape
        tolerance = ROUNDING[dtype] * np.abs(want) * 1.01 + 2.0**-22 * magnitude + 2.0**-25
        assert (np.abs(f64(got) - want) <= tolerance).all()


def test_reference_matches_the_oracle(backend):
    hidden, weight, bias = (x.detach().double() for x in make(3, 11, 17))
    value, mean, std = ensemble_value_reference(hidden, weight, bias)
    want = oracle_value(hidden, weight, bias)
    for got, expected in ((value, want), (mean, want.mean(0)), (std, want.std(0))):
        np.testing.assert_allclose(got.cpu().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_accumulate_in_float32(backend, dtype):
    hidden, weight, bias = make(2, 300 if backend == "triton" and INTERPRETED else 3000, 2048, dtype)
    out = ensemble_value(hidden, weight, bias, backend=backend)
    error = np.abs(f64(out.value) - oracle_value(hidden, weight, bias)).max()
    plain = torch.einsum("knh,kh->kn", hidden, weight) + bias[:, None]
    assert error <= np.abs(f64(plain) - oracle_value(hidden, weight, bias)).max()
    assert error <= 1e-3  # values reach 150; one rounding to bfloat16 costs 0.5

    # All rows pull one way, so that a low-precision running sum would stall.
    hidden = torch.rand(2, 3000, 64).to(dtype).requires_grad_()
    weight = torch.randn(2, 64).to(dtype).requires_grad_()
    bias = torch.zeros(2, dtype=dtype, requires_grad=True)
    grads = torch.autograd.grad(ensemble_value(hidden, weight, bias, backend=backend).value.sum(), [weight, bias])
    for got, want in zip(grads, oracle_grads(np.ones((2, 3000)), hidden, weight)[1:], strict=True):
        assert (np.abs(f64(got) - want) <= ROUNDING[dtype] * np.abs(want) * 1.01).all()


def test_dtypes_may_differ(backend):
    hidden = torch.randn(2, 5, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2, 8, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float16, requires_grad=True)
    out = ensemble_value(hidden, weight, bias, backend=backend)
    check_forward(out, hidden, weight, bias)
    out.value.sum().backward()
    assert [x.grad.dtype for x in (hidden, weight, bias)] == [torch.bfloat16, torch.float32, torch.float16]


def test_autocast_does_not_round_the_value(backend):
    hidden, weight, bias = make(2, 9, 64)
    plain = ensemble_value(hidden, weight, bias, backend=backend).value
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        cast = ensemble_value(hidden, weight, bias, backend=backend).value
        grads = torch.autograd.grad(cast.sum(), [hidden, weight, bias])
    assert torch.equal(plain, cast)
    expected = torch.autograd.grad(plain.sum(), [hidden, weight, bias])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_each_row_takes_its_own_upstream_gradient(backend):
    hidden, weight, bias = make(3, 6, 4)
    upstream = torch.zeros(3, 6)
    upstream[1, 4] = 2.5
    out = ensemble_value(hidden, weight, bias, backend=backend)
    grad_hidden, grad_weight, grad_bias = torch.autograd.grad(out.value, [hidden, weight, bias], upstream)
    expected = torch.zeros_like(hidden)
    expected[1, 4] = 2.5 * weight.detach()[1]
    assert torch.equal(grad_hidden, expected)
    expected = torch.zeros_like(weight)
    expected[1] = 2.5 * hidden.detach()[1, 4]
    assert torch.equal(grad_weight, expected)
    assert grad_bias.tolist() == [0, 2.5, 0]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_wanted_gradients_are_formed(backend, wanted):
    inputs = [x.detach() for x in make(2, 5, 3)]
    for i in wanted:
        inputs[i].requires_grad_()
    ensemble_value(*inputs, backend=backend).value.square().sum().backward()
    assert [x.grad is not None for x in inputs] == [i in wanted for i in range(3)]
    double = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    ensemble_value_reference(*double)[0].square().sum().backward()
    for i in wanted:
        np.testing.assert_allclose(f64(inputs[i].grad), double[i].grad.cpu().numpy(), rtol=1e-5, atol=1e-5)


def test_without_any_gradient(backend):
    hidden, weight, bias = make(2, 5, 3)
    with torch.no_grad():
        assert not ensemble_value(hidden, weight, bias, backend=backend).value.requires_grad


def test_one_critic_has_std_exactly_zero(backend):
    hidden, weight, bias = make(1, 50, 31)
    out = ensemble_value(hidden, weight, bias, backend=backend)
    assert torch.equal(out.std, torch.zeros(50))
    assert torch.equal(out.mean, out.value[0].detach())
    diverged = ensemble_value(hidden, weight, torch.tensor([torch.inf]), backend=backend)
    assert torch.equal(diverged.std, torch.zeros(50))


@pytest.mark.parametrize("k", [2, 3, 5, 7, 11])
def test_critics_that_agree_have_std_exactly_zero(backend, k):
    hidden, weight, bias = make(1, 5000, 5)
    out = ensemble_value(hidden.expand(k, -1, -1), weight.expand(k, -1), bias.expand(k), backend=backend)
    assert torch.equal(out.value, out.value[:1].expand(k, -1))
    assert torch.equal(out.std, torch.zeros(5000))
    assert torch.equal(out.mean, out.value[0].detach())


def test_std_survives_a_large_common_value(backend):
    hidden = torch.randn(4, 500, 1) + 4096  # E[v^2] - E[v]^2 would leave nothing of a std of 1
    out = ensemble_value(hidden, torch.ones(4, 1), backend=backend)
    np.testing.assert_allclose(f64(out.std), f64(out.value).std(0), rtol=1e-5)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_strided_inputs(backend, layout):
    hidden = torch.randn(7, 3, 10).transpose(0, 1) if layout == "transposed" else torch.randn(3, 14, 20)[:, ::2, ::2]
    weight = torch.randn(10, 3).T
    hidden.requires_grad_()
    out = ensemble_value(hidden, weight.requires_grad_(), backend=backend)
    check_forward(out, hidden, weight, None)
    grads = torch.autograd.grad(out.value.sum(), [hidden, weight])  # an expanded upstream gradient
    for got, want in zip(grads, oracle_grads(np.ones((3, 7)), hidden, weight)[:2], strict=True):
        np.testing.assert_allclose(f64(got), want, rtol=1e-5, atol=1e-5)


def test_repeats_to_the_bit(backend):
    hidden, weight, bias = make(3, 130, 67)
    runs = []
    for _ in range(2):
        out = ensemble_value(hidden, weight, bias, backend=backend)
        runs.append([*out, *torch.autograd.grad(out.value.square().sum(), [hidden, weight, bias])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("n", [1, 300])
def test_launches(backend, k, n, count_launches):
    if backend == "torch":
        pytest.skip("kernels of Triton are counted")
    for wanted in ((), (0,), (0, 1, 2), (1, 2), (1,), (2,)):
        inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(make(k, n, 65))]
        out = []

        def forward(inputs: list[Tensor] = inputs, out: list[EnsembleValue] = out) -> None:
            out.append(ensemble_value(*inputs, backend=backend))

        assert [name for name, _ in count_launches(forward)] == ["forward_kernel"]
        if wanted:
            names = [name for name, _ in count_launches(out[0].value.sum().backward)]
            assert names == ["backward_kernel", "add_parts_kernel"][: 1 if wanted == (0,) else 2]


@pytest.mark.parametrize("programs", [1, 7, 64])
def test_rows_cut_into_parts(backend, programs, monkeypatch):
    """Parts of several blocks, a last one that is shorter, and one part."""
    if backend == "triton":
        from asyppo_kernels.ensemble_value import triton_form

        monkeypatch.setattr(triton_form, "PROGRAMS", programs)
        monkeypatch.setattr(triton_form, "BACKWARD_TILE", 256)
    inputs = make(3, 130, 67)
    upstream = torch.randn(3, 130)
    grads = torch.autograd.grad(ensemble_value(*inputs, backend=backend).value, inputs, upstream)
    for got, want in zip(grads, oracle_grads(f64(upstream), *inputs[:2]), strict=True):
        np.testing.assert_allclose(f64(got), want, rtol=1e-5, atol=2e-5)


@given(
    k=st.integers(1, 5),
    n=st.integers(0, 40),
    h=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=15, deadline=None)
def test_any_shape(backend, k, n, h, dtype, bias, seed):
    torch.manual_seed(seed)
    inputs = make(k, n, h, dtype, bias=bias)
    check_forward(ensemble_value(*inputs, backend=backend), *inputs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend, dynamic):
    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = ensemble_value(hidden * 2, weight, bias, backend=backend)
        return (out.value - out.mean).square().sum(), out.mean, out.std

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (5, 9):
        inputs = make(2, n, 7)
        got, want = compiled(*inputs), step(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert not got[1].requires_grad
        grads = [torch.autograd.grad(x[0], inputs) for x in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(backend, dtype, bias):
    hidden, weight, b = make(2, 5, 6, dtype, bias=bias)
    torch.library.opcheck(_forward_op.registered, (hidden, weight, b))
    torch.library.opcheck(_forward_op.registered, (hidden.transpose(1, 2)[:, :, :4], weight[:, :4], b))
    plain = hidden.detach(), weight.detach()
    for needs in ((True, True, bias), (False, True, False), (True, False, False)):
        torch.library.opcheck(_backward_op.registered, (torch.randn(2, 5), *plain, dtype, *needs))


def test_errors_name_the_argument(backend):
    hidden, weight, bias = (x.detach() for x in make(2, 5, 3))
    for arguments, message in [
        (([1.0], weight, bias), "hidden: got list"),
        ((hidden[0], weight, bias), r"hidden: got shape \[5, 3\], needs \[M, N, H\]"),
        ((hidden[:0], weight[:0], None), r"hidden: got shape \[0, 5, 3\], needs .*M >= 1"),
        ((hidden.double(), weight, bias), "hidden: got dtype torch.float64"),
        ((hidden, weight[:1], bias), r"weight: got shape \[1, 3\], needs \[M, H\]"),
        ((hidden, weight[:, :2], bias), r"weight: got shape \[2, 2\]"),
        ((hidden, weight.int(), bias), "weight: got dtype torch.int32"),
        ((hidden, weight.to("meta"), bias), "weight: got device meta, needs cpu"),
        ((hidden, weight.to_sparse(), bias), "weight: got layout torch.sparse_coo"),
        ((hidden, weight, bias[:1]), r"bias: got shape \[1\], needs \[M\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            ensemble_value(*arguments, backend=backend)


def test_backends(backend):
    hidden, weight, _ = make(2, 5, 3)
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        ensemble_value(hidden, weight, backend="cuda")
    assert torch.equal(ensemble_value(hidden, weight).value, ensemble_value(hidden, weight, backend="torch").value)
