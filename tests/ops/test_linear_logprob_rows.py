"""``linear_logprob``: what is read, what is computed, and how often."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from asyppo_kernels import LinearLogprob, linear_logprob
from asyppo_kernels.linear_logprob import linear_logprob_reference
from tests.ops.logprob_oracle import FLOAT32, gradients, make
from tests.ops.policy_head import BACKENDS, DTYPES, ROUNDING, doubled, error, leaves

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


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
