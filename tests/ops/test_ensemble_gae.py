"""``ensemble_gae`` against a float64 oracle written here from its formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from asyppo_kernels import EnsembleGAE, ensemble_gae
from asyppo_kernels._args import INTERPRETED
from asyppo_kernels.ensemble_gae.op import _op
from asyppo_kernels.ensemble_gae.reference import ensemble_gae_reference
from asyppo_kernels.ensemble_gae.torch_form import BLOCK

BACKENDS = ["torch", "triton"]
NUMBERS = [(1.0, 0.95, 1.0), (0.99, 0.95, 0.9), (1.0, 1.0, 1.0), (1.0, 0.0, 0.5), (0.01, 0.3, 0.01), (0.0, 1.0, 1.0)]
RAGGED = sorted({1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5, BLOCK**2, BLOCK**2 + 1})
POISON = [float("nan"), float("inf"), -float("inf"), 3e38]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def f64(x: Tensor) -> np.ndarray:
    return x.double().cpu().numpy()


def make(k: int, b: int, t: int, dtype: torch.dtype = torch.float32, keep: float = 0.7):
    mask = torch.rand(b, t) < keep
    return torch.randn(k, b, t).to(dtype), torch.randn(b, t).to(dtype), mask


def oracle(value: Tensor, reward: Tensor, mask: Tensor, gamma: float, lam: float | Tensor, value_lam: float):
    """Row by row on the valid steps alone: the advantage is the sum of (gamma lam)^(j - i) delta_j over j >= i."""
    outputs = np.zeros((4, *mask.shape))
    lams = np.broadcast_to(f64(lam) if isinstance(lam, Tensor) else lam, len(mask))
    for row, (valid, lam) in enumerate(zip(mask.cpu().numpy(), lams, strict=True)):
        v, r = f64(value[:, row])[:, valid], f64(reward[row])[valid]
        n = len(r)
        if n == 0:
            continue
        mean = v.mean(0)
        delta = r + gamma * np.append(mean[1:], 0.0) - mean
        distance = np.arange(n)[None, :] - np.arange(n)[:, None]
        for out, base in ((0, gamma * lam), (1, gamma * value_lam)):
            powers = np.where(distance >= 0, np.float64(base) ** np.maximum(distance, 0), 0.0)
            outputs[out, row, valid] = powers @ delta
        outputs[1, row, valid] += mean
        outputs[2, row, valid] = mean
        outputs[3, row, valid] = v.std(0)
    return outputs


def check(out: EnsembleGAE, want: np.ndarray, mask: Tensor, tolerance: float = 2e-6) -> None:
    for name, got, expected in zip(out._fields, out, want, strict=True):
        assert got.dtype == torch.float32, name
        assert not got.requires_grad, name
        assert got.shape == mask.shape, name
        assert (got[~mask] == 0).all(), name
        error = np.abs(f64(got) - expected).max(initial=0) / (1 + np.abs(expected).max(initial=0))
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("t", RAGGED)
def test_matches_the_oracle(backend, t, numbers):
    if backend == "triton" and INTERPRETED and t > 1000 and numbers != NUMBERS[1]:
        pytest.skip("takes seconds in Triton's interpreter")
    gamma, lam, value_lam = numbers
    value, reward, mask = make(2, 3, t)
    out = ensemble_gae(value, reward, mask, gamma=gamma, lam=lam, value_lam=value_lam, backend=backend)
    check(out, oracle(value, reward, mask, *numbers), mask)


@pytest.mark.parametrize("k", [1, 4, 5])
def test_any_number_of_critics(backend, k):
    value, reward, mask = make(k, 4, 70)
    out = ensemble_gae(value, reward, mask, backend=backend)
    check(out, oracle(value, reward, mask, 1.0, 0.95, 1.0), mask)
    if k == 1:
        assert (out.std == 0).all()
        assert torch.equal(out.mean, value[0] * mask)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_reference_matches_the_oracle(backend, numbers):
    gamma, lam, value_lam = numbers
    value, reward, mask = make(3, 5, 40, torch.float64)
    got = ensemble_gae_reference(value, reward, mask, gamma=gamma, lam=lam, value_lam=value_lam)
    for x, want in zip(got, oracle(value, reward, mask, *numbers), strict=True):
        assert x.dtype == torch.float64
        np.testing.assert_allclose(x.cpu().numpy(), want, rtol=1e-12, atol=1e-12)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("few_rows", [0, 64])  # with 64, the rows are cut into chunks
@pytest.mark.parametrize(
    ("t", "by_row"),
    [
        (63, False),  # chunks of one block, the last of them short
        (64, True),
        (97, False),  # of two blocks, and a last of one with a single step
        *(pytest.param(t, by_row, marks=SLOW) for t in (65, 127, 129, 200, 257) for by_row in (False, True)),
    ],
)
def test_rows_walked_in_blocks(backend, t, few_rows, by_row, monkeypatch):
    """Holes and paddings that end a block, are longer than one, or fill it."""
    if backend == "triton":
        from asyppo_kernels.ensemble_gae import triton_form

        monkeypatch.setattr(triton_form, "BLOCK", 16)
        monkeypatch.setattr(triton_form, "LEAST_CHUNK", 16)
        monkeypatch.setattr(triton_form, "FEW_ROWS", few_rows)
        monkeypatch.setattr(triton_form, "MOST_CHUNKS", 5)
        assert (triton_form.chunks_of(5, t) > 3) == (few_rows > 0)
    value, reward, mask = make(3, 5, t)
    mask[0] = True
    mask[1, 13:50] = False
    mask[2, 20:] = False
    mask[3, :33] = False
    mask[4] = False
    lam = torch.linspace(0.5, 1.0, 5) if by_row else 0.9
    value, reward = value.masked_fill(~mask, torch.nan), reward.masked_fill(~mask, torch.nan)
    out = ensemble_gae(value, reward, mask, gamma=0.99, lam=lam, value_lam=1.0, backend=backend)
    check(out, oracle(value, reward, mask, 0.99, lam, 1.0), mask)


@pytest.mark.parametrize("t", [1, 7, 100])
def test_a_lambda_for_each_row(backend, t):
    """Each row comes out as with its own number; rows may share a program."""
    value, reward, mask = make(2, 9, t)
    lam = torch.linspace(0, 1, 9)
    strided = torch.stack([lam, lam], dim=1).flatten()[::2]
    out = ensemble_gae(value, reward, mask, gamma=0.9, lam=strided.requires_grad_(), value_lam=0.8, backend=backend)
    check(out, oracle(value, reward, mask, 0.9, lam, 0.8), mask)
    reference = ensemble_gae_reference(
        value.double(), reward.double(), mask, gamma=0.9, lam=lam.double(), value_lam=0.8
    )
    for got, want in zip(out, reference, strict=True):
        torch.testing.assert_close(got, want.float(), atol=2e-6, rtol=2e-6)
    for row in range(9):
        one = slice(row, row + 1)
        alone = ensemble_gae(
            value[:, one], reward[one], mask[one], gamma=0.9, lam=float(lam[row]), value_lam=0.8, backend=backend
        )
        torch.testing.assert_close(out.advantage[one], alone.advantage, atol=1e-6, rtol=1e-6)


def test_worked_by_hand(backend):
    # V = 1, 2, -, 4 at the valid steps 0, 1 and 3; the reward comes with the last token.
    value = torch.tensor([[[0.0, 1.0, 7.0, 4.0]], [[2.0, 3.0, 9.0, 4.0]]])
    reward = torch.tensor([[0.0, 0.0, 5.0, 8.0]])
    mask = torch.tensor([[True, True, False, True]])
    out = ensemble_gae(value, reward, mask, gamma=0.5, lam=0.5, value_lam=1.0, backend=backend)
    # delta = 0 + 0.5 * 2 - 1, 0 + 0.5 * 4 - 2, 8 - 4
    assert out.advantage.tolist() == [[0.25, 1.0, 0.0, 4.0]]
    assert out.returns.tolist() == [[2.0, 4.0, 0.0, 8.0]]  # the discounted reward: 8 / 4, 8 / 2, 8
    assert out.mean.tolist() == [[1.0, 2.0, 0.0, 4.0]]
    assert out.std.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_any_byte_but_zero_counts(backend):
    """A mask that is a view of other bytes."""
    value, reward, mask = make(2, 2, 20)
    bytes_ = (mask * torch.tensor([1, 2, 128, 255]).repeat(5)).to(torch.uint8)
    assert len(bytes_.unique()) == 5
    plain = ensemble_gae(value, reward, mask, backend=backend)
    other = ensemble_gae(value, reward, bytes_.view(torch.bool), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_the_value_of_the_next_valid_step_enters(backend):
    """A value moves the advantage of its own step and of the one before: not one later, not the masked one's."""
    mask = torch.tensor([[True, True, False, True, True]])
    reward = torch.zeros(1, 5)
    for step, expected in ((3, [[0.0, 1.0, 0.0, -1.0, 0.0]]), (4, [[0.0, 0.0, 0.0, 1.0, -1.0]]), (2, [[0.0] * 5])):
        value = torch.zeros(1, 1, 5)
        value[0, 0, step] = 1
        assert ensemble_gae(value, reward, mask, lam=0.0, backend=backend).advantage.tolist() == expected


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        *((pattern, torch.float32) for pattern in ("right", "left", "holes", "none", "one", "first", "last")),
        ("holes", torch.bfloat16),
    ],
)
def test_masked_steps_are_not_read(backend, pattern, dtype):
    t = BLOCK + 9
    value, reward, mask = make(2, 4, t, dtype)
    if pattern in ("right", "left"):
        lengths = torch.tensor([[0], [1], [BLOCK], [t]])
        mask = torch.arange(t) < lengths
        mask = mask.flip(1) if pattern == "left" else mask
    elif pattern != "holes":
        mask = torch.zeros(4, t, dtype=torch.bool)
        at = {"none": [], "one": [BLOCK], "first": [0], "last": [t - 1]}[pattern]
        mask[:, at] = True
    clean = ensemble_gae(value * mask, reward * mask, mask, backend=backend)
    check(clean, oracle(value, reward, mask, 1.0, 0.95, 1.0), mask)
    for poison in POISON:
        dirty = ensemble_gae(value.masked_fill(~mask, poison), reward.masked_fill(~mask, poison), mask, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True)), poison


def test_only_valid_steps_count(backend):
    """Scattering a row's valid steps over a longer one changes nothing: gamma does not count the gaps."""
    value, reward, _ = make(2, 1, 50)
    at = torch.randperm(300)[:50].sort().values
    mask = torch.zeros(1, 300, dtype=torch.bool)
    mask[:, at] = True
    wide_value, wide_reward = torch.full((2, 1, 300), torch.nan), torch.full((1, 300), torch.nan)
    wide_value[..., at], wide_reward[..., at] = value, reward
    dense = ensemble_gae(value, reward, mask[:, at], gamma=0.9, value_lam=0.8, backend=backend)
    spread = ensemble_gae(wide_value, wide_reward, mask, gamma=0.9, value_lam=0.8, backend=backend)
    for a, b in zip(dense, spread, strict=True):
        torch.testing.assert_close(b[:, at], a, rtol=1e-6, atol=1e-6)


def test_rows_do_not_touch_each_other(backend):
    value, reward, mask = make(2, 6, 100)
    alone = [ensemble_gae(value[:, i : i + 1], reward[i : i + 1], mask[i : i + 1], backend=backend) for i in range(6)]
    value[:, 2], reward[4], mask[2] = torch.nan, torch.inf, True
    together = ensemble_gae(value, reward, mask, backend=backend)
    for i in (0, 1, 3, 5):
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone[i], strict=True))


def test_an_own_return_per_critic(backend):
    value, reward, mask = make(3, 4, 60)
    for m in range(3):
        out = ensemble_gae(value[m : m + 1], reward, mask, value_lam=0.9, backend=backend)
        check(out, oracle(value[m : m + 1], reward, mask, 1.0, 0.95, 0.9), mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_float32(backend, dtype):
    value, reward, mask = make(2, 3, 500, dtype)
    want = oracle(value, reward, mask, 1.0, 0.95, 1.0)
    out = ensemble_gae(value, reward, mask, backend=backend)
    check(out, want, mask)
    plain = ensemble_gae_reference(value, reward, mask)
    for got, low, expected in zip(out, plain, want, strict=True):
        assert np.abs(f64(got) - expected).max() <= np.abs(f64(low) - expected).max()


def test_dtypes_may_differ(backend):
    value, reward, mask = make(2, 3, 40)
    out = ensemble_gae(value.bfloat16(), reward.half(), mask, backend=backend)
    check(out, oracle(value.bfloat16(), reward.half(), mask, 1.0, 0.95, 1.0), mask)


@pytest.mark.parametrize("numbers", [(1.0, 1.0, 1.0), (1.0, 0.95, 1.0), (0.05, 0.05, 1.0), (0.999, 0.97, 0.98)])
def test_long_rows(backend, numbers):
    gamma, lam, value_lam = numbers
    t = 131_072
    if backend == "triton" and INTERPRETED:
        t = 4097 if numbers[0] == 1.0 else 1500  # five chunks, and two blocks
    value, reward, mask = make(2, 1, t, keep=0.9)
    out = ensemble_gae(value, reward, mask, gamma=gamma, lam=lam, value_lam=value_lam, backend=backend)
    mean, r = f64(value).mean(0)[0], f64(reward)[0]
    want = np.zeros((4, 1, t))
    advantage = residual = next_value = 0.0
    for i in np.flatnonzero(mask[0].cpu().numpy())[::-1]:
        delta = r[i] + gamma * next_value - mean[i]
        advantage = delta + gamma * lam * advantage
        residual = delta + gamma * value_lam * residual
        next_value = mean[i]
        want[:2, 0, i] = advantage, residual + mean[i]
    want[2], want[3] = f64(value).mean(0) * mask.cpu().numpy(), f64(value).std(0) * mask.cpu().numpy()
    check(out, want, mask, tolerance=2e-6)


LARGE = {
    # gamma, lam, value_lam, the values' common level, a reward for each token
    "rewards at the end": (1.0, 0.95, 1.0, 30.0, False),
    "no lambda": (1.0, 1.0, 1.0, 30.0, False),
    "discounted": (0.99, 0.95, 1.0, 30.0, False),
    "a reward a token": (0.99, 0.95, 0.97, 30.0, True),
    "a reward a token, no discount": (1.0, 1.0, 0.95, 30.0, True),
    "very large values": (1.0, 0.95, 1.0, 3000.0, False),
    "small values": (1.0, 1.0, 1.0, 0.0, True),
}


@pytest.mark.parametrize("name", LARGE)
def test_no_worse_than_a_float32_loop(backend, name):
    """The largest error is at most that of the loop, and a unit in the last place of the largest true number; where
    every step counts or those at an end do not, and where there are holes in other rows."""
    gamma, lam, value_lam, level, each = LARGE[name]
    b, t = (2, 1100) if backend == "triton" and INTERPRETED else (16, 1200)
    value, reward, mask = make(2, b, t)
    mask[: b // 2] = True
    mask[: b // 4, :100] = False
    mask[b // 4 : b // 2 - 1, -100:] = False
    value = level + 0.1 * value
    if not each:
        reward = torch.zeros(b, t)
        last = t - 1 - mask.flip(1).int().argmax(1)
        reward[torch.arange(b), last] = level + torch.randn(b)
    numbers = {"gamma": gamma, "lam": lam, "value_lam": value_lam}
    want = oracle(value, reward, mask, gamma, lam, value_lam)
    loop = ensemble_gae_reference(value, reward, mask, **numbers)
    for rows in (slice(None), slice(b // 2)):
        ours = ensemble_gae(value[:, rows], reward[rows], mask[rows], backend=backend, **numbers)
        for field, got, plain, expected in zip(ours._fields, ours, loop, want, strict=True):
            allowed = np.abs(f64(plain[rows]) - expected[rows]).max() + 2**-23 * np.abs(expected[rows]).max()
            assert np.abs(f64(got) - expected[rows]).max() <= allowed, field


@pytest.mark.parametrize(("gamma", "level"), [(1.0, 30.1), (1.0, 1e4), (0.5, 0.7)])
def test_zero_where_the_loop_is_zero(backend, gamma, level):
    """Critics that predict the reward to the bit leave nothing to learn, whatever the size of their values."""
    t = 1100 if gamma == 1.0 else 40
    mask = torch.rand(3, t) < 0.8
    mask[:, -1] = True
    steps_left = mask.flip(1).cumsum(1).flip(1) - 1
    value = (torch.tensor(level) * torch.tensor(gamma) ** steps_left).expand(2, 3, t)
    reward = torch.zeros(3, t)
    reward[:, -1] = level
    out = ensemble_gae(value, reward, mask, gamma=gamma, backend=backend)
    assert (ensemble_gae_reference(value, reward, mask, gamma=gamma).advantage == 0).all()
    assert (out.advantage == 0).all()
    assert torch.equal(out.returns, value[0] * mask)


@pytest.mark.parametrize("keep", [0.7, 1.0])
@pytest.mark.parametrize("at", [0, 5, 39])
def test_a_nan_that_counts_shows(backend, at, keep):
    """A diverged critic's step and all before it come out NaN, as in a loop; those after it do not."""
    value, reward, mask = make(2, 2, 40, keep=keep)
    mask[0, at] = True
    value[1, 0, at] = torch.nan
    out = ensemble_gae(value, reward, mask, backend=backend)
    for got in (out.advantage, out.returns):
        assert torch.equal(got[0, : at + 1].isnan(), mask[0, : at + 1])
        assert got[0, at + 1 :].isfinite().all()
        assert got[1].isfinite().all()


@pytest.mark.parametrize("power", [-80, 110])
@pytest.mark.parametrize("keep", [0.9, 1.0])
def test_any_scale(backend, keep, power):
    """Numbers 2^power times as large give results 2^power times as large, however fast the sums decay."""
    value, reward, mask = make(2, 3, 300 if backend == "triton" and INTERPRETED else 1100, keep=keep)
    numbers = {"lam": 0.6, "value_lam": 0.4, "backend": backend}
    plain = ensemble_gae(value, reward, mask, **numbers)
    scaled = ensemble_gae(value * 2.0**power, reward * 2.0**power, mask, **numbers)
    for name, a, b in zip(plain._fields, plain, scaled, strict=True):
        assert torch.equal(a * 2.0**power, b), name


@pytest.mark.parametrize("lam", [0.9, 1.0])
def test_one_lambda_for_both(backend, lam):
    value, reward, mask = make(2, 3, 70)
    out = ensemble_gae(value, reward, mask, gamma=0.9, lam=lam, value_lam=lam, backend=backend)
    check(out, oracle(value, reward, mask, 0.9, lam, lam), mask)
    assert torch.equal(out.returns, torch.where(mask, out.advantage + out.mean, 0))


def test_std_survives_a_large_common_value(backend):
    value = torch.randn(3, 2, 200) + 4096
    out = ensemble_gae(value, torch.zeros(2, 200), torch.ones(2, 200, dtype=torch.bool), backend=backend)
    np.testing.assert_allclose(f64(out.std), f64(value).std(0), rtol=1e-5)


@pytest.mark.parametrize(("b", "t"), [(0, 5), (3, 0), (1, 1)])
def test_tiny(backend, b, t):
    value, reward, mask = make(2, b, t, keep=1.0)
    check(ensemble_gae(value, reward, mask, backend=backend), oracle(value, reward, mask, 1.0, 0.95, 1.0), mask)


def test_strided_inputs_and_detached_outputs(backend):
    value, reward, mask = make(2, 5, 37)
    plain = ensemble_gae(value, reward, mask, backend=backend)
    strided = ensemble_gae(
        value.movedim(0, 2).contiguous().movedim(2, 0).requires_grad_(),
        reward.T.contiguous().T.requires_grad_(),
        mask.T.contiguous().T,
        backend=backend,
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))
    assert not any(x.requires_grad for x in strided)
    assert all(x.is_contiguous() for x in strided)


def test_inputs_are_left_alone(backend):
    inputs = make(1, 3, 50)
    before = [x.clone() for x in inputs]
    ensemble_gae(*inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("b", "t", "launches"),
    [
        (1, 1, [("gae_kernel", (1,))]),
        (9, 100, [("gae_kernel", (3,))]),  # four short rows a program
        (2, 2100, [("gae_kernel", (2,))]),
        (2, 3100, [("summary_kernel", (6,)), ("gae_kernel", (8,))]),  # four chunks a row
        (1, 131_072, [("summary_kernel", (63,)), ("gae_kernel", (64,))]),
        (65, 8192, [("gae_kernel", (65,))]),
        (512, 8192, [("gae_kernel", (512,))]),
    ],
)
def test_launches(backend, b, t, launches, count_launches, monkeypatch):
    if backend == "torch":
        pytest.skip("kernels of Triton are counted")
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", lambda *arguments, **options: None)  # only counted
    value, reward, mask = torch.zeros(1, 1, 1).expand(2, b, t), torch.zeros(1, 1).expand(b, t), torch.ones(b, t).bool()
    assert count_launches(lambda: ensemble_gae(value, reward, mask, backend=backend)) == launches


def rows(max_t: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=max_t))


def check_any(backend: str, k: int, mask: np.ndarray, numbers: tuple[float, float, float], seed: int) -> None:
    torch.manual_seed(seed)
    value, reward, _ = make(k, *mask.shape)
    mask = torch.tensor(mask)
    gamma, lam, value_lam = numbers
    out = ensemble_gae(value, reward, mask, gamma=gamma, lam=lam, value_lam=value_lam, backend=backend)
    check(out, oracle(value, reward, mask, *numbers), mask)


UNIT = st.floats(0, 1, allow_subnormal=False)
ANY = {"k": st.integers(1, 5), "mask": rows(80), "numbers": st.tuples(UNIT, UNIT, UNIT), "seed": st.integers(0, 2**31)}


@given(**ANY | {"mask": rows(40)})
@settings(max_examples=20, deadline=None)
def test_any_mask(backend, k, mask, numbers, seed):
    check_any(backend, k, mask, numbers, seed)


@pytest.mark.slow
def test_many_masks(backend):
    @given(**ANY)
    @settings(max_examples=60 if backend == "triton" and INTERPRETED else 1000, deadline=None)
    def check_many(k: int, mask: np.ndarray, numbers: tuple[float, float, float], seed: int) -> None:
        check_any(backend, k, mask, numbers, seed)

    check_many()


@pytest.mark.parametrize(("dynamic", "by_row"), [(False, False), (True, False), (True, True)])
def test_compiles_to_one_graph(backend, dynamic, by_row):
    def step(value: Tensor, reward: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> EnsembleGAE:
        return ensemble_gae(value * 2, reward, mask, gamma=gamma, lam=lam, value_lam=0.9, backend=backend)

    torch.compiler.reset()  # the limit of recompilations counts those of all cases
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for t, gamma in ((5, 1.0), (40, 0.9)):
        inputs, lam = make(2, 3, t), torch.rand(3) if by_row else 0.95
        got, want = compiled(*inputs, gamma, lam), step(*inputs, gamma, lam)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_opcheck(backend):
    value, reward, mask = make(2, 3, 41)
    torch.library.opcheck(_op.registered, (value, reward, mask, 0.99, 0.95, 1.0))
    torch.library.opcheck(_op.registered, (value, reward, mask, 0.99, 0.0, 1.0, torch.rand(3)))
    torch.library.opcheck(_op.registered, (value[:1].bfloat16(), reward.T.contiguous().T, mask, 1.0, 0.95, 1.0))


def test_errors_name_the_argument(backend):
    value, reward, mask = make(2, 3, 4)
    for arguments, message in [
        ((None, reward, mask), "value: got NoneType"),
        ((value[0], reward, mask), r"value: got shape \[3, 4\], needs \[M, B, T\]"),
        ((value[:0], reward, mask), r"value: got shape \[0, 3, 4\], needs .*M >= 1"),
        ((value.long(), reward, mask), "value: got dtype torch.int64"),
        ((value, reward[:, :3], mask), r"reward: got shape \[3, 3\], needs \[B, T\]"),
        ((value, reward.double(), mask), "reward: got dtype torch.float64"),
        ((value, reward, mask.float()), "mask: got dtype torch.float32, needs torch.bool"),
        ((value, reward, mask[:1]), r"mask: got shape \[1, 4\]"),
        ((value, reward, mask.to("meta")), "mask: got device meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            ensemble_gae(*arguments, backend=backend)
    for lam, message in [
        (torch.ones(2), r"lam: got shape \[2\], needs \[B\] of value"),
        (torch.ones(3, dtype=torch.float64), "lam: got dtype torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            ensemble_gae(value, reward, mask, lam=lam, backend=backend)
    for name in ("gamma", "lam", "value_lam"):
        for number in (-0.01, 1.01, float("nan"), None, torch.tensor(0.5)):
            with pytest.raises(ValueError, match=rf"{name}: got .*needs a number in \[0, 1\]"):
                ensemble_gae(value, reward, mask, **{name: number}, backend=backend)
