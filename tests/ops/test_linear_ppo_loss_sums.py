"""``linear_ppo_loss``: float32 masters, chunks, micro-batches and scales, and where numbers are large or small."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from asyppo_kernels import LinearPPOLoss, linear_logprob, linear_ppo_loss
from asyppo_kernels.linear_ppo_loss import linear_ppo_loss_reference
from tests.ops.policy_head import BACKENDS, MASTERS, ROUNDING, error, skip_in_interpreter
from tests.ops.ppo_loss_oracle import EVERYTHING, HEAD, check, doubled, leaves, make, oracle, results

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@MASTERS
def test_masters_get_gradients_that_nothing_rounds(
    backend: str, compute_dtype: torch.dtype, masters: tuple[torch.dtype | None, torch.dtype | None]
) -> None:
    """Products are those of rounded inputs; a float32 master's gradient is as near the oracle as float32 allows."""
    data = make(30, 16, 101)
    for name, dtype in zip(("hidden", "weight"), masters, strict=True):
        data[name] = data[name].detach().to(dtype or compute_dtype).requires_grad_()
    check(data, backend, **EVERYTHING, compute_dtype=compute_dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [1.0, -0.37])
def test_masters_rounded_inside_or_outside_compute_the_same(backend: str, dtype: torch.dtype, upstream: float) -> None:
    """To the bit, but that a gradient is not rounded, which without a compute dtype it is."""
    data = make(30, 16, 101)
    rounded = data | {k: data[k].detach().to(dtype).requires_grad_() for k in ("hidden", "weight")}
    inside = results(
        linear_ppo_loss(**data, **EVERYTHING, compute_dtype=dtype, backend=backend), data, upstream=upstream
    )
    outside = results(linear_ppo_loss(**rounded, **EVERYTHING, backend=backend), rounded, upstream=upstream)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a.to(b.dtype), b)
    for got, rounded_once in zip(inside[5:7], outside[5:7], strict=True):
        assert got.dtype == torch.float32
        assert not torch.equal(got, rounded_once.float())


def test_masters_compile_without_graph_breaks(backend: str) -> None:
    def loss(hidden: Tensor, **data: Tensor) -> LinearPPOLoss:
        options = EVERYTHING | {"compute_dtype": torch.bfloat16}
        return linear_ppo_loss(hidden * 1.5, old_logprob=None, **data, **options, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    data = make(12, 4, 11)
    del data["old_logprob"]
    for got, want in zip(results(compiled(**data), data, 2.0), results(loss(**data), data, 2.0), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("rows", "compact"), [(1, True), (7, True), (7, False), (19, False)])
def test_chunks_change_nothing(backend: str, compact: bool, rows: int, count_gemms: Callable[..., list[int]]) -> None:
    """And no more than workspace_bytes of logits exist at once."""
    n, h, v = 20, 8, 211
    data = make(n, h, v)
    whole = linear_ppo_loss(**data, **EVERYTHING, backend=backend)
    chunked: list[LinearPPOLoss] = []
    gemms = count_gemms(
        lambda: chunked.append(
            linear_ppo_loss(**data, **EVERYTHING, compact=compact, workspace_bytes=12 * v * rows, backend=backend)
        )
    )
    assert max(gemms) <= 3 * rows * h * v  # 12 bytes an element may be one block of logits or three
    for a, b in zip(results(whole, data), results(chunked[0], data), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_memory_is_a_chunk_of_logits_and_one_gradient_of_the_weight(backend: str) -> None:
    """On a CPU, whose allocations the profiler sees; the upstream scale needs no second gradient."""
    if backend != "torch" or torch.get_default_device().type != "cpu":
        pytest.skip("the interpreter allocates otherwise, and a GPU keeps three blocks")
    n, h, v = 64, 16, 4001
    data = make(n, h, v)
    chunk, gradient = 4 * v * 16, 4 * v * h
    out: list[LinearPPOLoss] = []
    calls = (
        lambda: out.append(linear_ppo_loss(**data, **EVERYTHING, workspace_bytes=chunk, backend=backend)),
        lambda: out[0].loss.backward(),
    )
    calls[0]()
    calls[1]()
    out.clear()
    data["weight"].grad = None
    for call, most in zip(calls, (chunk + 1.4 * gradient, 0.4 * gradient), strict=True):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
            call()
        live, peak = 0, 0
        events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
        assert peak <= most


@pytest.mark.parametrize("upstream", [1.0, -3.0])
def test_a_graph_that_is_kept_keeps_its_gradients(backend: str, upstream: float) -> None:
    """What a backward overwrites is nobody's but the last one's."""
    data = make(9, 4, 31)
    loss = upstream * linear_ppo_loss(**data, **EVERYTHING, backend=backend).loss
    kept = [torch.autograd.grad(loss, leaves(data), retain_graph=True) for _ in range(2)]
    before = [x.clone() for x in kept[0]]
    loss.backward(retain_graph=True)
    for x in leaves(data):
        assert x.grad is not None
        x.grad.zero_()
    loss.backward()
    for x, *others in zip(leaves(data), *kept, before, strict=True):
        assert all(torch.equal(other, x.grad) for other in others)


def test_micro_batches_add_up(backend: str) -> None:
    """Losses and gradients of the parts sum to those of the whole, a fully masked part included."""
    data = make(50, 8, 31)
    data["token_weight"][20:30] = 0.0
    whole = results(linear_ppo_loss(**data, **EVERYTHING, backend=backend), data)
    parts = []
    for start, stop in itertools.pairwise([0, 7, 20, 30, 31, 50]):
        part = {k: x if k in ("weight", "bias") else x[start:stop] for k, x in data.items()}
        out = linear_ppo_loss(**part, **EVERYTHING, backend=backend)
        parts.append([out.loss.detach(), *torch.autograd.grad(out.loss, leaves(data))])
    for total, pieces in zip([whole[0], *whole[5:]], zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(total, torch.stack(pieces).sum(0), rtol=1e-5, atol=1e-5)


def test_weight_gradient_accumulates_in_float32(backend: str) -> None:
    """Over hundreds of chunks of one row, a bfloat16 sum would stall."""
    data = make(300, 8, 11, torch.bfloat16, masks=False, counted=1.0)
    with torch.no_grad():
        data["hidden"].abs_()
    data["target"][:], data["advantage"][:] = 3, 1.0
    data["old_logprob"] = linear_logprob(*(data[k].detach() for k in ("hidden", "weight", "target"))).logprob
    check(data, backend, workspace_bytes=1)


@pytest.mark.parametrize("upstream", [1.0, -3.25, 0.0, 65536.0])
def test_loss_scales_with_any_upstream_gradient(backend: str, upstream: float) -> None:
    """In float32, rounded once to the input's dtype."""
    data = make(20, 8, 31, torch.bfloat16)
    full = {k: x.detach().float().requires_grad_() if k in HEAD else x for k, x in data.items()}
    got = results(linear_ppo_loss(**data, **EVERYTHING, backend=backend), data, upstream)[5:]
    exact = results(linear_ppo_loss(**full, **EVERYTHING, backend=backend), full)[5:]
    for g, e in zip(got, exact, strict=True):
        assert error(g, upstream * e.double()) <= ROUNDING[torch.bfloat16] * (2 if backend == "triton" else 1) * 1.001
    out = linear_ppo_loss(**data, **EVERYTHING, backend=backend)
    scaled = torch.autograd.grad(out.loss * upstream, leaves(data))
    for a, b in zip(scaled, got, strict=True):
        assert torch.equal(a, b)


def test_float16_gradients_survive_small_token_weights(backend: str) -> None:
    """Weights of 1e-7 times a loss scale of 2^16: formed in float16, the gradients would be flushed to zero."""
    data = make(16, 8, 31, torch.float16, counted=1.0)
    data["token_weight"] *= 1e-7
    check(data, backend, upstream=2.0**16, **EVERYTHING)


def test_backward_twice(backend: str) -> None:
    data = make(20, 8, 31)
    out = linear_ppo_loss(**data, **EVERYTHING, backend=backend)
    first, second = results(out, data), results(out, data)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_deterministic_and_inputs_unchanged(backend: str) -> None:
    data = make(40, 16, 301)
    before = {k: v.detach().clone() for k, v in data.items()}
    runs = [results(linear_ppo_loss(**data, **EVERYTHING, backend=backend), data) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(x, data[name]) for name, x in before.items())


@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("v", [127, 129])
def test_logits_far_from_zero(backend: str, shift: float, v: int) -> None:
    """Nothing may count as exp(0) beside logits that are all very negative, and nothing may overflow."""
    data = make(9, 4, v, counted=1.0)
    with torch.no_grad():
        data["bias"] += shift
    options = EVERYTHING | {"softcap": None, "temperature": 1.0}
    check(data, backend, tolerance=4 * 2.0**-23 * abs(shift), **options)


def test_bias_of_minus_infinity_bans_a_token(backend: str) -> None:
    data = make(6, 4, 9, counted=1.0)
    data["target"].clamp_(min=1)
    with torch.no_grad():
        data["bias"][0] = -torch.inf
    out = linear_ppo_loss(**data, entropy_coef=0.1, kl_coef=0.1, backend=backend)
    assert all(x.isfinite().all() for x in results(out, data))


@pytest.mark.parametrize("compact", [True, False])
def test_many_rows_in_one_dimension(backend: str, compact: bool) -> None:
    """More than a grid dimension's 65,535."""
    skip_in_interpreter(backend)
    data = make(70_001, 2, 3)
    exact_data = doubled(data)
    out = results(linear_ppo_loss(**data, **EVERYTHING, compact=compact, backend=backend), data)
    want = results(linear_ppo_loss_reference(**exact_data, **EVERYTHING), exact_data)
    for got, exact in zip([*out[1:4], out[5]], [*want[1:4], want[5]], strict=True):
        assert error(got, exact) <= 1e-5
    assert error(out[0], want[0]) <= 1e-5


@pytest.mark.slow
def test_more_logits_than_int32_counts(backend: str) -> None:
    """Rows beyond logit number 2^31, which only 64-bit offsets reach."""
    skip_in_interpreter(backend)
    n, v = 65_600, 32_771
    assert n * v > 2**31
    data = make(20, 1, v, masks=False, counted=1.0)
    tail = slice(n - 20, n)
    whole = {k: x if k in ("weight", "bias") else torch.zeros(n, *x.shape[1:], dtype=x.dtype) for k, x in data.items()}
    for k, x in whole.items():
        if k not in ("weight", "bias"):
            x[tail] = data[k].detach()
    whole["token_weight"][: n - 20] = 1.0  # rows that count, with no advantage
    whole["hidden"].requires_grad_()
    whole["weight"], whole["bias"] = data["weight"].detach(), None
    exact_data = doubled(data | {"weight": whole["weight"], "bias": None})
    out = results(linear_ppo_loss(**whole, compact=False, backend=backend), whole)
    want = results(oracle(**exact_data), exact_data)
    for i in (1, 2, 3, 5):
        assert error(out[i][tail], want[i]) <= 1e-5
    assert (out[5][: n - 20] == 0).all()
