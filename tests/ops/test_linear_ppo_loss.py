"""``linear_ppo_loss`` against a float64 oracle written here from its formulas."""

from __future__ import annotations

import importlib
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyppo_kernels import LinearPPOLoss, linear_logprob, linear_ppo_loss
from asyppo_kernels._args import INTERPRETED
from asyppo_kernels._policy_head import HeadOptions
from asyppo_kernels.linear_ppo_loss import linear_ppo_loss_reference
from asyppo_kernels.linear_ppo_loss.rows import PPOOptions, RowInputs

BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
FLOAT32 = 4e-6  # of the largest element: a float32 sum of a few hundred terms, and exp of a difference of log-probs
HEAD = ("hidden", "weight", "bias")

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def make(
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    *,
    masks: bool = True,
    counted: float = 0.75,
    scale: float = 1.0,
) -> dict[str, Any]:
    """All tensors of the loss. Old and reference log-probs are near enough for ratios on both sides of the clip."""
    hidden = (torch.randn(n, h) * scale).to(dtype)
    weight = (torch.randn(v, h) / h**0.5).to(dtype)
    target = torch.randint(v, (n,))
    bias = torch.randn(v).to(dtype)
    logp = (hidden.double() @ weight.double().T + bias.double()).log_softmax(1).gather(1, target[:, None]).squeeze(1)
    old_logprob = (logp + 0.3 * torch.randn(n)).float()
    token_weight = torch.rand(n).where(torch.rand(n) < counted, 0.0)
    target[torch.rand(n) < (1 - counted) / 2] = -100
    data = {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "target": target,
        "old_logprob": old_logprob,
        "advantage": torch.randn(n).where(torch.rand(n) < 0.9, 0.0),
        "token_weight": token_weight,
        "bias": bias.requires_grad_(),
    }
    if masks:
        data |= {
            "advantage_keep": torch.rand(n) < 0.7,
            "entropy_keep": torch.rand(n) < 0.7,
            "ref_logprob": (logp + 0.5 * torch.randn(n)).float(),
            "rollout_weight": torch.rand(n).where(torch.rand(n) < 0.9, 0.0),
        }
    return data


SLOW = pytest.mark.slow
EVERYTHING = {
    "temperature": 0.8,
    "softcap": 6.0,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 1.5,
    "entropy_coef": 0.3,
    "kl_coef": 0.2,
    "kl_bias_correction": True,
}


def oracle(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    token_weight: Tensor,
    *,
    advantage_keep: Tensor | None = None,
    entropy_keep: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl_bias_correction: bool = False,
    dead_row_stats: bool = True,
) -> LinearPPOLoss:
    """Token by token in float64; rows that do not count are not looked at."""
    loss = 0.0 * hidden[:0].sum() + 0.0 * weight[:0].sum() + (0.0 if bias is None else 0.0 * bias[:0].sum())
    n = len(target)
    stats = torch.zeros(3, n, dtype=torch.float64)
    clipped = torch.zeros(n, dtype=torch.bool)
    for t in range(n):
        w = float(token_weight[t])
        if w == 0 or int(target[t]) == -100:
            continue
        keep_a = advantage_keep is None or bool(advantage_keep[t])
        keep_h = entropy_keep is None or bool(entropy_keep[t])
        a = float(advantage[t]) if keep_a else 0.0
        u = float(rollout_weight[t]) if keep_a and rollout_weight is not None else 1.0
        live = a * u != 0 or (entropy_coef != 0 and keep_h) or kl_coef != 0
        if not live and not dead_row_stats:
            continue

        z = weight @ hidden[t]
        if bias is not None:
            z = z + bias
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / temperature
        log_p = z - torch.logsumexp(z, 0)
        logp = log_p[int(target[t])]
        h = -(log_p.exp() * log_p).sum()

        def surrogate(x: Tensor, a: float = a) -> tuple[Tensor, Tensor]:
            r = torch.exp(x if -20 <= x <= 20 else torch.full_like(x, 20.0).copysign(x.detach()))
            low, high = 1 - clip_low, 1 + clip_high
            clipped_r = r if low <= r <= high else torch.full_like(r, low if r < low else high)
            s = r * a if r * a <= clipped_r * a else clipped_r * a
            if dual_clip is not None and a < 0 and s < dual_clip * a:
                s = torch.full_like(s, dual_clip * a)
            return r, s

        old = logp.item() if old_logprob is None else float(old_logprob[t])
        r, s = surrogate(logp - old)
        if a != 0:
            x = (logp.detach() - old).requires_grad_()
            s_of_x = surrogate(x)[1]
            clipped[t] = not s_of_x.requires_grad or torch.autograd.grad(s_of_x, x)[0] == 0
        stats[:, t] = torch.stack([logp, h, r]).detach()

        token = -u * s if keep_a else 0.0
        if keep_h:
            token = token - entropy_coef * h
        if kl_coef != 0:
            d = float(ref_logprob[t]) - logp
            d = d if -20 <= d <= 20 else torch.full_like(d, 20.0).copysign(d.detach())
            k3 = torch.exp(d) - d - 1
            token = token + kl_coef * (r * k3 if kl_bias_correction else k3)
        loss = loss + w * token
    return LinearPPOLoss(loss, *stats, clipped)


def rounded_logit_gradients(data: dict[str, Any], upstream: float, **options: Any) -> dict[str, Tensor]:
    """What a bfloat16 gradient of the logits, which is what the Triton form's products take, can add to the errors of
    the gradients of hidden, weight and bias, in float64: a rounding of every term of their sums, which may cancel."""
    hidden, weight, token_weight = (data[name].detach() for name in ("hidden", "weight", "token_weight"))
    bias = weight.new_zeros(len(weight)) if data.get("bias") is None else data["bias"].detach()
    data = {**data, "hidden": hidden, "weight": weight, "bias": bias.requires_grad_()}
    rows = []
    for row in range(len(hidden)):
        data["token_weight"] = torch.where(torch.arange(len(hidden)) == row, token_weight, 0.0)
        # The bias is added to the logits: its gradient is theirs.
        rows += torch.autograd.grad(upstream * oracle(**data, **options).loss, bias)
    terms = torch.stack(rows).abs() * ROUNDING[torch.bfloat16]
    return {"hidden": terms @ weight.abs(), "weight": terms.T @ hidden.abs(), "bias": terms.sum(dim=0)}


def doubled(data: dict[str, Any], compute_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The same numbers in float64, for the oracle and for gradients that nothing rounds; hidden and weight as the
    products take them."""
    rounded = {name: data[name].to(compute_dtype) for name in ("hidden", "weight") if compute_dtype is not None}
    return {
        name: rounded.get(name, x).detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in data.items()
    }


def skip_in_interpreter(backend: str) -> None:
    """Where there are tens of thousands of programs, each of which takes it milliseconds."""
    if backend == "triton" and INTERPRETED:
        pytest.skip("takes the interpreter minutes; runs on a GPU")


def leaves(data: dict[str, Any]) -> list[Tensor]:
    """What gets gradients, in the order hidden, weight, bias."""
    return [x for x in map(data.get, HEAD) if x is not None and x.requires_grad]


def error(got: Tensor, want: Tensor, floor: float = 1e-30) -> float:
    """The largest error, over the largest element (``floor``, if that is larger)."""
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=floor)).item()


def results(out: LinearPPOLoss, data: dict[str, Any], upstream: float = 1.0) -> list[Tensor]:
    """Loss, statistics and gradients, one after the other."""
    if not out.loss.requires_grad:
        return [*out]
    grads = torch.autograd.grad(
        out.loss, leaves(data), torch.tensor(upstream, dtype=out.loss.dtype), retain_graph=True, allow_unused=True
    )
    return [*out, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves(data), strict=True))]


def check(
    data: dict[str, Any],
    backend: str,
    *,
    tolerance: float = FLOAT32,
    floor: float = 1e-30,
    upstream: float = 1.0,
    **options: Any,
) -> LinearPPOLoss:
    """Loss, statistics and gradients are as near the oracle as float32, and a rounding to the input's dtype, allow."""
    out = linear_ppo_loss(**data, **options, backend=backend)
    compute_dtype = options.get("compute_dtype")
    exact_data = doubled(data, compute_dtype)
    wanted = {k: v for k, v in options.items() if k not in ("compact", "workspace_bytes", "compute_dtype")}
    want = oracle(**exact_data, **wanted)
    assert out.loss.shape == ()
    assert out.loss.requires_grad
    assert not any(x.requires_grad for x in out[1:])
    assert [x.dtype for x in out] == [torch.float32] * 4 + [torch.bool]
    assert torch.equal(out.clipped, want.clipped)
    got_all, exact_all = results(out, data, upstream), results(want, exact_data, upstream)
    # The loss is a sum in which signs cancel: its error is measured against the sum of magnitudes.
    magnitude = (exact_data["token_weight"].abs().sum() * (1 + want.loss.detach().abs())).item()
    assert abs(out.loss.item() - want.loss.item()) <= tolerance * max(magnitude, 1.0)
    for got, exact in zip(got_all[1:4], exact_all[1:4], strict=True):
        assert error(got, exact, floor) <= tolerance
    more: dict[str, Tensor] = {}
    if backend == "triton" and (compute_dtype or data["weight"].dtype) == torch.bfloat16 and len(data["target"]):
        more = rounded_logit_gradients(exact_data, upstream, **wanted)
    names = [name for name in HEAD if data.get(name) is not None and data[name].requires_grad]
    for name, got, exact in zip(names, got_all[5:], exact_all[5:], strict=True):
        assert got.dtype == data[name].dtype
        allowed = (4 * tolerance + ROUNDING[got.dtype]) * exact.abs().max().clamp(min=floor) if exact.numel() else 0.0
        assert ((got.double() - exact).abs() <= allowed + more.get(name, 0.0)).all()
    return out


# --- values and gradients ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("masks", [True, False])
def test_reference_is_the_definition(backend: str, masks: bool) -> None:
    data = doubled(make(40, 5, 23, masks=masks))
    options = EVERYTHING if masks else {"clip_high": 0.3}
    got, want = (results(f(**data, **options), data, 2.0) for f in (linear_ppo_loss_reference, oracle))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_reference_reads_nothing_that_does_not_count(backend: str) -> None:
    clean, dirty = soiled(make(40, 5, 23))
    for a, b in zip(*(results(linear_ppo_loss_reference(**d, **EVERYTHING), d) for d in (clean, dirty)), strict=True):
        assert torch.equal(a, b)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("options", "compact"),
    [
        (EVERYTHING, True),
        (EVERYTHING, False),
        ({"clip_low": 0.0, "clip_high": 0.0}, True),
        ({"dual_clip": 1.0001}, False),
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


# --- float32 masters --------------------------------------------------------------------------------------------------


MASTERS = [(torch.float32, torch.float32), (None, torch.float32), (torch.float32, None), (None, None)]


@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("masters", MASTERS)
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


# --- sums, scales, chunks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 19])
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


# --- numerical traps --------------------------------------------------------------------------------------------------


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


# --- what is read, and what is computed -------------------------------------------------------------------------------


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


# --- autocast, torch.library, torch.compile ---------------------------------------------------------------------------


def test_autocast_does_not_reach_inside(backend: str) -> None:
    data = make(9, 16, 101)
    want = results(linear_ppo_loss(**data, **EVERYTHING, backend=backend), data)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(linear_ppo_loss(**data, **EVERYTHING, backend=backend), data)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_second_derivative_is_refused(backend: str) -> None:
    data = make(4, 3, 5)
    out = linear_ppo_loss(**data, **EVERYTHING, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, data["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("full", "compact"), [(True, True), (False, False)])
def test_opcheck(backend: str, dtype: torch.dtype, full: bool, compact: bool) -> None:
    data = make(6, 4, 11, dtype)
    optional = ("advantage_keep", "entropy_keep", "ref_logprob", "rollout_weight", "bias")
    inputs = (data["hidden"], data["weight"], data["target"], data["old_logprob"] if full else None)
    inputs = (*inputs, data["advantage"], data["token_weight"])
    compute_dtype = torch.bfloat16 if full else dtype
    numbers = (0.9, 4.0, 0.2, 0.3, 2.0, 0.1, 0.1, True) if full else (1.0, None, 0.2, 0.2, None, 0.0, 0.0, False)
    torch.library.opcheck(
        torch.ops.asyppo.linear_ppo_loss.default,
        (
            *inputs,
            *(data[k] if full else None for k in optional),
            *numbers,
            torch.float32,
            compute_dtype,
            compact,
            True,
            None,
            backend,
            True,
            full,
            full,
        ),
    )
    torch.library.opcheck(torch.ops.asyppo.scale_cast.default, (torch.rand(5, 3), torch.rand(()), dtype))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_compiles_without_graph_breaks(backend: str, dynamic: bool, compact: bool) -> None:
    def loss(hidden: Tensor, **data: Tensor) -> LinearPPOLoss:
        return linear_ppo_loss(hidden * 1.5, **data, **EVERYTHING, compact=compact, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (12, 17) if dynamic else (12,):
        data = make(n, 4, 11)
        for got, want in zip(results(compiled(**data), data, 2.0), results(loss(**data), data, 2.0), strict=True):
            torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**data).loss, loss(**data).loss)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(4, 3, dtype=torch.float64)}, "hidden: got dtype torch.float64, needs"),
        ({"weight": torch.randn(5, 2)}, r"weight: got shape \[5, 2\], needs \[V, H\] = \[V, 3\]"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, "target: got dtype torch.int32, needs torch.int64"),
        ({"old_logprob": torch.zeros(4, 1)}, r"old_logprob: got shape \[4, 1\], needs \[N\] = \[4\]"),
        ({"advantage": torch.zeros(4, dtype=torch.int64)}, "advantage: got dtype torch.int64, needs"),
        ({"token_weight": torch.zeros(3)}, r"token_weight: got shape \[3\], needs \[N\] = \[4\]"),
        ({"token_weight": torch.zeros(4, device="meta")}, "token_weight: got device meta, needs c"),
        ({"token_weight": None}, "token_weight: got NoneType, needs a tensor"),
        ({"advantage_keep": torch.ones(4)}, "advantage_keep: got dtype torch.float32, needs torch.bool"),
        ({"entropy_keep": torch.ones(5).bool()}, r"entropy_keep: got shape \[5\]"),
        ({"ref_logprob": torch.ones(5)}, r"ref_logprob: got shape \[5\]"),
        ({"rollout_weight": torch.ones(5)}, r"rollout_weight: got shape \[5\]"),
        ({"bias": torch.ones(4)}, r"bias: got shape \[4\], needs \[V\] = \[5\]"),
        ({"temperature": -1.0}, "temperature: got -1.0, needs a number above 0"),
        ({"softcap": 0.0}, "softcap: got 0.0, needs a number above 0"),
        ({"clip_low": -0.1}, "clip_low: got -0.1, needs a number of at least 0"),
        ({"clip_high": -0.1}, "clip_high: got -0.1, needs"),
        ({"dual_clip": 1.0}, "dual_clip: got 1.0, needs a number above 1"),
        ({"entropy_coef": float("inf")}, "entropy_coef: got inf, needs a finite number"),
        ({"kl_coef": float("nan")}, "kl_coef: got nan, needs a finite number"),
        ({"kl_coef": 0.1}, r"ref_logprob: got None, needs \[N\] = \[4\], since kl_coef is 0.1"),
        ({"logits_dtype": torch.float64}, "logits_dtype: got torch.float64, needs"),
        ({"compute_dtype": torch.float64}, "compute_dtype: got torch.float64, needs torch.float32 or"),
        ({"compute_dtype": "bf16"}, "compute_dtype: got 'bf16', needs torch.float32 or"),
        (
            {"compute_dtype": torch.float16, "hidden": torch.randn(4, 3).bfloat16()},
            "hidden: got dtype torch.bfloat16, needs torch.float16 or torch.float32",
        ),
        (
            {"compute_dtype": torch.float32, "weight": torch.randn(5, 3).bfloat16()},
            "weight: got dtype torch.bfloat16, needs torch.float32$",
        ),
        ({"weight": torch.randn(5, 3).bfloat16()}, "weight: got dtype torch.bfloat16, needs torch.float32$"),
        ({"kl_bias_correction": 1.0}, "kl_bias_correction: got 1.0, needs True or False"),
        ({"workspace_bytes": 0}, "workspace_bytes: got 0, needs a positive int"),
        ({"workspace_bytes": 1e9}, "workspace_bytes: got 1000000000.0, needs a positive int"),
        ({"backend": "cuda"}, "backend: got 'cuda', needs"),
    ],
)
def test_errors_name_the_argument(backend: str, change: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.randn(4, 3),
        "weight": torch.randn(5, 3),
        "target": torch.zeros(4, dtype=torch.int64),
        "old_logprob": torch.zeros(4),
        "advantage": torch.zeros(4),
        "token_weight": torch.zeros(4),
        "backend": backend,
    }
    with pytest.raises(ValueError, match=message):
        linear_ppo_loss(**{**arguments, **change})


# --- anything ---------------------------------------------------------------------------------------------------------


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
