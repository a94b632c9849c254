"""``linear_ppo_loss``: what is read, what is computed, and what gets gradients."""

from __future__ import annotations

import importlib
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from asyppo_kernels import LinearPPOLoss, linear_ppo_loss
from asyppo_kernels._policy_head import HeadOptions
from asyppo_kernels.linear_ppo_loss import linear_ppo_loss_reference
from asyppo_kernels.linear_ppo_loss.rows import PPOOptions, RowInputs
from tests.ops.policy_head import BACKENDS
from tests.ops.ppo_loss_oracle import EVERYTHING, HEAD, check, doubled, leaves, make, oracle, results

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

SLOW = pytest.mark.slow


def soiled(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The data, and a copy with NaN (a wild target) wherever it must not be read."""
    dirty = {k: x.detach().clone().requires_grad_(x.requires_grad) for k, x in data.items()}
    off = (data["token_weight"] == 0) | (data["target"] == -100)
    no_advantage = off | ~data["advantage_keep"]
    assert off.any()
    assert (no_advantage & ~off).any()
    with torch.no_grad():
        dirty["hidden"][off] = torch.nan
        for name in ("old_logprob", "ref_logprob"):
            dirty[name][off] = torch.nan
        for name in ("advantage", "rollout_weight"):
            dirty[name][no_advantage] = torch.nan
    dirty["target"][data["token_weight"] == 0] = 10**9
    dirty["token_weight"][dirty["target"] == -100] = torch.nan
    for name in ("advantage_keep", "entropy_keep"):
        dirty[name][off] ^= True
    return data, dirty


BOTH = list(itertools.product([True, False], repeat=2))
ROWS_LEFT_OUT = [
    *((EVERYTHING, *both) for both in BOTH),
    ({}, True, False),
    ({}, False, False),
    ({"entropy_coef": 0.1}, True, True),
    ({"kl_coef": 0.1}, True, False),
]
"""(options, compact, dead_row_stats) of the fast suite; the slow one has the other combinations."""


@pytest.mark.parametrize(
    ("options", "compact", "dead_row_stats"),
    [
        *ROWS_LEFT_OUT,
        *(
            pytest.param(options, *both, marks=SLOW)
            for options in ({}, {"entropy_coef": 0.1}, {"kl_coef": 0.1})
            for both in BOTH
            if (options, *both) not in ROWS_LEFT_OUT
        ),
    ],
)
def test_what_does_not_count_is_not_read(
    backend: str, compact: bool, dead_row_stats: bool, options: dict[str, Any]
) -> None:
    """Results are the same to the bit, and those of rows that do not count are zero."""
    clean, dirty = soiled(make(60, 5, 29))
    got, want = (
        results(linear_ppo_loss(**d, **options, compact=compact, dead_row_stats=dead_row_stats, backend=backend), d)
        for d in (dirty, clean)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    off = (clean["token_weight"] == 0) | (clean["target"] == -100)
    for x in got[1:6]:
        assert (x[off] == 0).all()


def test_reference_reads_nothing_that_does_not_count(backend: str) -> None:
    clean, dirty = soiled(make(40, 5, 23))
    for a, b in zip(*(results(linear_ppo_loss_reference(**d, **EVERYTHING), d) for d in (clean, dirty)), strict=True):
        assert torch.equal(a, b)


def test_nan_in_what_counts_is_not_hidden(backend: str) -> None:
    for name in ("hidden", "old_logprob", "advantage", "token_weight", "ref_logprob", "rollout_weight"):
        data = make(5, 4, 7, counted=1.0)
        data["advantage_keep"][:] = True
        with torch.no_grad():
            data[name][2] = torch.nan
        assert linear_ppo_loss(**data, kl_coef=0.1, backend=backend).loss.isnan(), name


def test_reference_log_prob_is_not_read_without_kl(backend: str) -> None:
    data = make(8, 4, 7)
    nan = data | {"ref_logprob": torch.full((8,), torch.nan)}
    without = {k: x for k, x in data.items() if k != "ref_logprob"}
    for a, b in zip(*(results(linear_ppo_loss(**d, backend=backend), d) for d in (nan, without)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("n", [0, 1, 6])
def test_no_row_counts(backend: str, compact: bool, n: int) -> None:
    """A fully masked micro-batch: loss 0, attached, zero gradients, nothing NaN."""
    data = make(n, 4, 7)
    data["token_weight"] = torch.zeros(n)
    out = linear_ppo_loss(**data, **EVERYTHING, compact=compact, backend=backend)
    assert out.loss.item() == 0
    assert out.loss.requires_grad
    grads = torch.autograd.grad(out.loss, leaves(data))
    for x in (*out[1:], *grads):
        assert (x == 0).all()
    assert out.logprob.shape == (n,)


@pytest.mark.parametrize("compact", [True, False])
def test_counted_rows_that_are_all_dead(backend: str, compact: bool) -> None:
    data = make(6, 4, 7, counted=1.0, masks=False) | {"advantage": torch.zeros(6)}
    out = linear_ppo_loss(**data, compact=compact, backend=backend)
    assert out.loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(out.loss, leaves(data)))
    torch.testing.assert_close(out.logprob, oracle(**doubled(data)).logprob.float())


@pytest.mark.parametrize("dead_row_stats", [True, False])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_arithmetic_is_that_of_the_rows_that_count(
    backend: str, dead_row_stats: bool, entropy_coef: float, count_gemms: Callable[..., list[int]]
) -> None:
    """Rows with w != 0 join one GEMM, live rows two more; the backward has none, and no_grad only the first."""
    n, h, v = 64, 8, 61
    data = make(n, h, v)
    counted = (data["token_weight"] != 0) & (data["target"] != -100)
    live = counted & data["advantage_keep"] & (data["advantage"] * data["rollout_weight"] != 0)
    if entropy_coef:
        live |= counted & data["entropy_keep"]
    n_live, n_counted = int(live.sum()), int(counted.sum())
    assert 0 < n_live < n_counted < n
    first = n_counted if dead_row_stats else n_live
    out: list[LinearPPOLoss] = []

    def run() -> None:
        out.append(linear_ppo_loss(**data, entropy_coef=entropy_coef, dead_row_stats=dead_row_stats, backend=backend))

    assert sum(count_gemms(run)) == (first + 2 * n_live) * h * v
    assert count_gemms(lambda: out[0].loss.backward()) == []
    with torch.no_grad():
        assert sum(count_gemms(run)) == first * h * v
    for a, b in zip(*out, strict=True):
        assert torch.equal(a.detach(), b)
    assert not out[1].loss.requires_grad


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_gradients_only_where_needed(
    backend: str, needs: tuple[bool, bool, bool], count_gemms: Callable[..., list[int]]
) -> None:
    n, h, v = 8, 4, 37
    data = make(n, h, v, counted=1.0)
    want = torch.autograd.grad(linear_ppo_loss(**data, **EVERYTHING, backend=backend).loss, leaves(data))
    for name, need in zip(HEAD, needs, strict=True):
        data[name].requires_grad_(need)
    out: list[LinearPPOLoss] = []
    gemms = count_gemms(lambda: out.append(linear_ppo_loss(**data, **EVERYTHING, backend=backend)))
    assert sum(gemms) == (1 + needs[0] + needs[1]) * n * h * v
    assert out[0].loss.requires_grad == any(needs)
    if any(needs):
        out[0].loss.backward()
    for name, need, grad in zip(HEAD, needs, want, strict=True):
        assert (data[name].grad is not None) == need
        if need:
            torch.testing.assert_close(data[name].grad, grad)


def test_only_the_head_gets_gradients(backend: str) -> None:
    data = make(8, 4, 7)
    for name in ("old_logprob", "advantage", "token_weight", "ref_logprob", "rollout_weight"):
        data[name].requires_grad_()
    linear_ppo_loss(**data, **EVERYTHING, backend=backend).loss.backward()
    assert [k for k, x in data.items() if x.grad is not None] == ["hidden", "weight", "bias"]
    for name in HEAD:
        data[name].requires_grad_(False)
    assert not linear_ppo_loss(**data, **EVERYTHING, backend=backend).loss.requires_grad


def test_without_compaction_no_value_reaches_the_host(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors have no values: reading one raises."""
    form = importlib.import_module(f"asyppo_kernels.linear_ppo_loss.{backend}_form")
    if backend == "triton":  # a launch reads nothing on the host, but has to be one of real memory
        for name in ("loss_kernel", "rows_kernel"):
            monkeypatch.setattr(form, name, defaultdict(lambda: lambda *args, **kwargs: None))
    data = {k: x.to("meta") for k, x in make(20, 4, 7).items()}
    ppo = PPOOptions(0.2, 0.3, 2.0, 0.1, 0.1, kl_bias_correction=True)
    given = RowInputs(**{k: data[k] for k in RowInputs._fields})

    def run(compact: bool) -> Tensor:
        return form.forward(
            *(data[k] for k in HEAD),
            given,
            HeadOptions(0.9, 5.0, torch.float32),
            ppo,
            compact=compact,
            dead_row_stats=True,
            workspace_bytes=12 * 7 * 6,
            need_hidden=True,
            need_weight=True,
            need_bias=True,
        ).d_weight

    with torch.no_grad():
        assert run(compact=False).shape == (7, 4)
        with pytest.raises(NotImplementedError, match="meta"):
            run(compact=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_row_inputs_of_any_float_dtype(backend: str, dtype: torch.dtype) -> None:
    """They are computed with in float32."""
    data = make(20, 4, 7)
    names = ("old_logprob", "advantage", "token_weight", "ref_logprob", "rollout_weight")
    cast = {k: x.to(dtype) if k in names else x for k, x in data.items()}
    same = {k: x.float() if k in names else x for k, x in cast.items()}
    for a, b in zip(
        *(results(linear_ppo_loss(**d, **EVERYTHING, backend=backend), d) for d in (cast, same)), strict=True
    ):
        assert torch.equal(a, b)


def test_non_contiguous_inputs(backend: str) -> None:
    data = make(24, 6, 19)
    strided = {
        k: torch.stack([x.detach(), torch.full_like(x, 1)], -1)[..., 0].requires_grad_(x.requires_grad)
        for k, x in data.items()
    }
    strided["advantage"] = torch.tensor(0.7).expand(24)
    assert not strided["hidden"].is_contiguous()
    check(strided, backend, **EVERYTHING)
