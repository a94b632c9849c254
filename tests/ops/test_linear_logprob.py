"""``linear_logprob`` against its float64 oracle: values, gradients, numerical traps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyppo_kernels import linear_logprob
from asyppo_kernels.linear_logprob import linear_logprob_reference
from tests.ops.logprob_oracle import FLOAT32, check, gradients, make, oracle
from tests.ops.policy_head import BACKENDS, DTYPES, MASTERS, doubled, error, leaves, skip_in_interpreter

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


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
