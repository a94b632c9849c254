"""``linear_ppo_loss`` against the float64 oracle: values and gradients, in every combination of options."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyppo_kernels import linear_logprob, linear_ppo_loss
from asyppo_kernels.linear_ppo_loss import linear_ppo_loss_reference
from tests.ops.policy_head import BACKENDS, DTYPES, HEAD, doubled, error, leaves
from tests.ops.ppo_loss_oracle import EVERYTHING, FLOAT32, check, make, oracle, results

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

SLOW = pytest.mark.slow


@pytest.mark.parametrize(("n", "h", "v"), [(1, 1, 2), (1, 7, 1), (5, 3, 127), (23, 8, 257), (6, 17, 64), (4, 5, 65)])
@pytest.mark.parametrize("compact", [True, False])
def test_matches_oracle_at_ragged_shapes(backend: str, n: int, h: int, v: int, compact: bool) -> None:
    data = make(n, h, v)
    data["target"][0], data["token_weight"][0] = v - 1, 1.0
    check(data, backend, **EVERYTHING, compact=compact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masks", [True, False])
def test_matches_oracle_in_every_dtype(backend: str, dtype: torch.dtype, masks: bool) -> None:
    """The logits are accumulated in float32, so low-precision inputs cost no precision of loss and statistics."""
    options = EVERYTHING if masks else {"entropy_coef": 0.1}
    check(make(30, 16, 101, dtype, masks=masks), backend, **options, upstream=-3.5)


@pytest.mark.parametrize(("compact", "dead_row_stats"), list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize(
    "given",
    [(True, True), (False, False), pytest.param((True, False), marks=SLOW), pytest.param((False, True), marks=SLOW)],
)
def test_every_combination_of_masks(
    backend: str, compact: bool, dead_row_stats: bool, entropy_coef: float, kl_coef: float, given: tuple[bool, bool]
) -> None:
    """Each row has one of the combinations of target, w, keepA, keepH, A = 0 and u = 0; all of them occur."""
    combinations = torch.tensor(list(itertools.product([False, True], repeat=6)))
    has_target, weighted, keep_a, keep_h, has_advantage, has_u = combinations.unbind(1)
    data = make(64, 5, 13, counted=1.0)
    data["target"] = data["target"].where(has_target, -100)
    data["token_weight"] = data["token_weight"].where(weighted, 0.0)
    data["advantage"] = data["advantage"].where(has_advantage, 0.0)
    data["rollout_weight"] = data["rollout_weight"].where(has_u, 0.0)
    data["advantage_keep"] = keep_a if given[0] else None
    data["entropy_keep"] = keep_h if given[1] else None
    check(
        data,
        backend,
        compact=compact,
        dead_row_stats=dead_row_stats,
        entropy_coef=entropy_coef,
        kl_coef=kl_coef,
        clip_high=0.1,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_worse_than_plain_torch_of_the_same_precision(backend: str, dtype: torch.dtype) -> None:
    data = make(33, 64, 509, dtype)
    exact_data = doubled(data)
    out = results(linear_ppo_loss(**data, **EVERYTHING, backend=backend), data)
    plain = results(linear_ppo_loss_reference(**data, **EVERYTHING), data)
    exact = results(oracle(**exact_data, **EVERYTHING), exact_data)
    for i, (a, b, c) in enumerate(zip(out, plain, exact, strict=True)):
        if i != 4:
            assert error(a, c) <= error(b, c) + FLOAT32


@pytest.mark.usefixtures("blocks_of_eight_warps")
@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, {}), (torch.bfloat16, {"entropy_coef": 0.1}), (torch.bfloat16, EVERYTHING)]
)
def test_matches_oracle_over_several_blocks_of_eight_warps(
    backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    check(make(6, 16, 20_011, dtype), backend, **options)


@pytest.mark.parametrize("masks", [True, False])
def test_reference_is_the_definition(backend: str, masks: bool) -> None:
    data = doubled(make(40, 5, 23, masks=masks))
    options = EVERYTHING if masks else {"clip_high": 0.3}
    got, want = (results(f(**data, **options), data, 2.0) for f in (linear_ppo_loss_reference, oracle))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


LOG_RATIOS = [-25.0, -3.0, -0.25, -0.15, 0.0, 0.15, 0.23, 0.26, 0.6, 1.2, 3.0, 19.0, 25.0]


@pytest.mark.parametrize("dual_clip", [None, 3.0, 1.1])
def test_surrogate_at_every_ratio(backend: str, dual_clip: float | None) -> None:
    """Both sides of both clips, of the dual clip and of the clamp, at both signs of the advantage."""
    pairs = list(itertools.product(LOG_RATIOS, [1.5, -0.7, 0.0]))
    data = make(len(pairs), 4, 11, masks=False, counted=1.0)
    logprob = oracle(**doubled(data)).logprob
    data["old_logprob"] = (logprob - torch.tensor([p[0] for p in pairs])).float()
    data["advantage"] = torch.tensor([p[1] for p in pairs])
    # One row at a time, lest the gradient of a large ratio hide the others.
    options = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": dual_clip}
    for i in range(len(pairs)):
        row = {k: x[i : i + 1] if k not in ("weight", "bias") else x for k, x in data.items()}
        row["hidden"] = row["hidden"].detach().requires_grad_()
        check(row, backend, tolerance=2e-5, **options)
    out = linear_ppo_loss(**data, **options, backend=backend)
    expected = [
        a != 0
        and (
            abs(x) > 20
            or (a > 0 and x > 0.25)
            or (a < 0 and x < -0.2)
            or (a < 0 and dual_clip is not None and x > torch.tensor(dual_clip).log().item())
        )
        for x, a in pairs
    ]
    assert out.clipped.tolist() == expected


def test_clamped_log_ratios(backend: str) -> None:
    data = make(2, 4, 11, counted=1.0)
    data["old_logprob"] = torch.tensor([-40.0, 40.0])
    out = linear_ppo_loss(**data, backend=backend)
    torch.testing.assert_close(out.ratio, torch.tensor([20.0, -20.0]).exp())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_clamped_reference_ratio_has_no_gradient(backend: str, sign: float) -> None:
    data = make(3, 4, 11, counted=1.0)
    data["ref_logprob"] = torch.full((3,), 60.0 * sign)
    out = linear_ppo_loss(**data | {"advantage": torch.zeros(3)}, kl_coef=0.1, backend=backend)
    want = 0.1 * (torch.tensor(20.0 * sign).exp() - 20 * sign - 1)
    torch.testing.assert_close(out.loss, (data["token_weight"] * want).sum())
    assert all((g == 0).all() for g in torch.autograd.grad(out.loss, leaves(data)))


RATIOS_OF_KL = [-25.0, -2.0, 0.4, 3.0, 19.5, 25.0]


def test_kl_at_every_pair_of_ratios(backend: str) -> None:
    """With the bias correction, each factor's clamp takes that factor's gradient only."""
    pairs = list(itertools.product(RATIOS_OF_KL, RATIOS_OF_KL))
    data = make(len(pairs), 4, 11, masks=False, counted=1.0) | {"advantage": torch.zeros(len(pairs))}
    logprob = oracle(**doubled(data)).logprob
    data["old_logprob"], data["ref_logprob"] = (
        (logprob - sign * torch.tensor([pair[i] for pair in pairs])).float() for i, sign in ((0, 1), (1, -1))
    )
    # One row at a time, lest the gradient of a large ratio hide the others.
    for i in range(len(pairs)):
        row = {k: x[i : i + 1] if k not in ("weight", "bias") else x for k, x in data.items()}
        row["hidden"] = row["hidden"].detach().requires_grad_()
        for kl_bias_correction in (False, True):
            check(row, backend, tolerance=4e-5, kl_coef=0.1, kl_bias_correction=kl_bias_correction)


def test_kl_bias_correction_is_without_effect_where_there_is_no_kl(backend: str) -> None:
    data = make(20, 4, 11)
    with_it, without = (
        results(linear_ppo_loss(**data, kl_bias_correction=x, backend=backend), data) for x in (True, False)
    )
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


@pytest.mark.parametrize(
    ("dtype", "options", "compact"),
    [
        *((dtype, EVERYTHING, True) for dtype in DTYPES),
        (torch.float32, EVERYTHING, False),
        (torch.float32, {"clip_low": 0.0, "clip_high": 0.0}, True),
        (torch.float32, {"dual_clip": 1.0001}, False),
    ],
)
def test_without_old_logprob_the_ratio_is_one_and_has_a_gradient(
    backend: str, dtype: torch.dtype, options: dict[str, Any], compact: bool
) -> None:
    data = make(30, 16, 101, dtype) | {"old_logprob": None}
    out = check(data, backend, **options, compact=compact)
    counted = (data["token_weight"] != 0) & (data["target"] != -100)
    assert torch.equal(out.ratio, counted.float())
    assert not out.clipped.any()
    (grad,) = torch.autograd.grad(out.loss, data["hidden"])
    moved = counted & data["advantage_keep"] & (data["advantage"] * data["rollout_weight"] != 0)
    assert moved.any()
    assert (grad[moved] != 0).any(dim=1).all()


def test_without_old_logprob_is_as_with_the_rows_own(backend: str) -> None:
    data = make(30, 16, 101)
    own = linear_ppo_loss(**data | {"old_logprob": None}, **EVERYTHING, backend=backend)
    same = linear_ppo_loss(**data | {"old_logprob": own.logprob}, **EVERYTHING, backend=backend)
    for a, b in zip(results(own, data), results(same, data), strict=True):
        assert torch.equal(a, b)


def test_without_old_logprob_a_banned_target_has_ratio_one(backend: str) -> None:
    data = make(3, 4, 7, counted=1.0, masks=False) | {"old_logprob": None}
    data["target"] = torch.tensor([1, 0, 2])
    with torch.no_grad():
        data["bias"][0] = -torch.inf
    out = linear_ppo_loss(**data, backend=backend)
    assert (out.ratio == 1).all()
    assert all(x.isfinite().all() for x in (out.loss, *torch.autograd.grad(out.loss, leaves(data))))


def test_first_update_has_ratio_one(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old log-probs come from ``linear_logprob``; chunks and compaction move a row's log-prob by less than 1e-4."""
    monkeypatch.setattr(importlib.import_module("asyppo_kernels._policy_head_kernels"), "MAX_BLOCK", 2048)
    torch.manual_seed(1)
    n, h, v = 24, 96, 2101
    head = {
        "hidden": torch.randn(n, h).bfloat16() * 3,
        "weight": torch.randn(v, h).bfloat16(),
        "target": torch.randint(v, (n,)),
    }
    options = {"temperature": 0.7, "softcap": 50.0}
    old = linear_logprob(**head, **options, entropy=False, backend=backend).logprob
    assert old.min() < -20
    token_weight = (torch.rand(n) < 0.7).float()
    for compact, workspace in itertools.product([True, False], [None, 12 * v * 7, 1]):
        out = linear_ppo_loss(
            **head,
            **options,
            old_logprob=old,
            advantage=torch.randn(n),
            token_weight=token_weight,
            compact=compact,
            workspace_bytes=workspace,
            backend=backend,
        )
        assert ((out.logprob - old).abs() <= 1e-4)[token_weight != 0].all()
        assert ((out.ratio - 1).abs() <= 1e-4)[token_weight != 0].all()
        assert not out.clipped.any()


def test_bf16_logits(backend: str) -> None:
    """The error is that of rounding the logits: the log-prob is that of linear_logprob on the same logits."""
    data = make(30, 64, 307, torch.bfloat16, counted=1.0)
    out = linear_ppo_loss(**data, kl_coef=0.1, logits_dtype=torch.bfloat16, backend=backend)
    head = {k: data[k] for k in (*HEAD, "target")}
    same = linear_logprob(**head, logits_dtype=torch.bfloat16, backend=backend)
    counted = (data["token_weight"] != 0) & (data["target"] != -100)
    torch.testing.assert_close(out.logprob[counted], same.logprob[counted])
    exact = oracle(**doubled(data))
    assert 1e-4 < error(out.logprob[counted], exact.logprob[counted]) < 2.0**-7
    assert (out.logprob <= 0).all()


def check_anything(backend: str, data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31), label="seed"))
    n, h, v = draw(st.integers(0, 12)), draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 31, 32, 33, 127]))
    dtype = draw(st.sampled_from(DTYPES))
    inputs = make(n, h, v, dtype, counted=draw(st.sampled_from([0.0, 0.5, 1.0])))
    compute_dtype = draw(st.sampled_from([None, dtype, *(DTYPES if dtype == torch.float32 else [])]))
    for name in ("old_logprob", "advantage_keep", "entropy_keep", "rollout_weight", "bias"):
        if draw(st.booleans(), label=f"no {name}"):
            inputs[name] = None
    check(  # where a distribution is all but one-hot, log-prob and gradients are differences of numbers near 1
        inputs,
        backend,
        tolerance=1e-5,
        floor=1.0,
        temperature=draw(st.sampled_from([0.5, 1.0, 2.5])),
        softcap=draw(st.sampled_from([None, 3.0, 50.0])),
        clip_low=draw(st.sampled_from([0.0, 0.2])),
        clip_high=draw(st.sampled_from([0.0, 0.28])),
        dual_clip=draw(st.sampled_from([None, 1.05, 3.0])),
        entropy_coef=draw(st.sampled_from([0.0, 0.1, -0.1])),
        kl_coef=draw(st.sampled_from([0.0, 0.1])),
        kl_bias_correction=draw(st.booleans()),
        compute_dtype=compute_dtype,
        compact=draw(st.booleans()),
        dead_row_stats=draw(st.booleans()),
        workspace_bytes=draw(st.sampled_from([None, 1, 12 * v * 3])),
    )


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_anything(backend: str, data: st.DataObject) -> None:
    check_anything(backend, data)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_anything_at_length(backend: str, data: st.DataObject) -> None:
    check_anything(backend, data)
