"""``agreement_masks`` against an oracle written here from its formulas, in exact arithmetic."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyppo_kernels import AgreementMasks, agreement_masks
from asyppo_kernels._args import INTERPRETED
from asyppo_kernels.agreement_masks import torch_form
from asyppo_kernels.agreement_masks.op import (
    TRITON_LEVELS,
    TRITON_WIDTHS,
    _apply_op,
    _count_op,
    _descend_op,
    _triton_apply_op,
    _triton_count_all_op,
    _triton_count_op,
    _triton_op,
    _triton_span_op,
)
from asyppo_kernels.agreement_masks.reference import agreement_masks_reference

BACKENDS = ["torch", "triton"]
FRACTIONS = [(0.2, 0.2), (0.0, 0.0), (0.5, 0.1), (0.1, 0.999999), (1 / 3, 2 / 3)]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def oracle(std: Tensor, mask: Tensor, k: float, h: float) -> tuple[np.ndarray, np.ndarray, float, float]:
    values, valid = std.double().cpu().numpy(), mask.cpu().numpy()
    ordered = sorted(values[valid].tolist())
    n = len(ordered)
    if n == 0:
        return valid.copy(), valid.copy(), 0.0, 0.0
    low = ordered[int(Fraction(f"{k:.6f}") * n)]
    high = ordered[n - 1 - int(Fraction(f"{h:.6f}") * n)]
    return valid & (values >= low), valid & (values <= high), low, high


def check(out: AgreementMasks, want: tuple[np.ndarray, np.ndarray, float, float]) -> None:
    assert [x.dtype for x in out] == [torch.bool, torch.bool, torch.float32, torch.float32]
    assert out.low.shape == out.high.shape == ()
    np.testing.assert_array_equal(out.advantage_keep.cpu().numpy(), want[0])
    np.testing.assert_array_equal(out.entropy_keep.cpu().numpy(), want[1])
    assert (out.low.item(), out.high.item()) == want[2:]


def run(std: Tensor, mask: Tensor, k: float, h: float, backend: str, **more: object) -> AgreementMasks:
    return agreement_masks(std, mask, advantage_fraction=k, entropy_fraction=h, backend=backend, **more)


def equal(a: AgreementMasks, b: AgreementMasks) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def make(kind: str, *shape: int) -> Tensor:
    return {
        "uniform": lambda: torch.rand(shape),
        "heavy": lambda: torch.randn(shape).mul(5).exp(),  # over many exponents: the first digit decides
        "close": lambda: 1 + torch.rand(shape) * 1e-4,  # one exponent: the last digits decide
        "ties": lambda: torch.randint(0, 4, shape).float(),
        "constant": lambda: torch.full(shape, 0.25),
        "zeros": lambda: torch.zeros(shape),
        "subnormal": lambda: torch.randint(0, 50, shape).float() * 1e-45,
    }[kind]()


def signed_nan(sign: float) -> Tensor:
    return torch.tensor(torch.nan).copysign(torch.tensor(sign))


KINDS = ["uniform", "heavy", "close", "ties", "constant", "zeros", "subnormal"]


# Every kind of digits at every pair of ranks; a few tokens at every pair of ranks, and every kind in rows.
SAMPLES = [((1000,), kind, fractions) for kind in KINDS for fractions in FRACTIONS]
SAMPLES += [((13, 77), kind, FRACTIONS[i % 5]) for i, kind in enumerate(KINDS)]
FEW = [(1,), (2,), (7,), (3, 1, 5)]
SAMPLES += [(shape, KINDS[(i + j) % 7], f) for i, shape in enumerate(FEW) for j, f in enumerate(FRACTIONS)]


@pytest.mark.parametrize(("shape", "kind", "fractions"), SAMPLES)
def test_matches_the_oracle(backend, shape, kind, fractions):
    std, mask = make(kind, *shape), torch.rand(shape) < 0.7
    out = run(std, mask, *fractions, backend)
    check(out, oracle(std, mask, *fractions))
    want = agreement_masks_reference(std, mask, advantage_fraction=fractions[0], entropy_fraction=fractions[1])
    assert equal(out, want)


def test_reference_in_float64(backend):
    std, mask = make("close", 999).double() + torch.rand(999, dtype=torch.float64) * 1e-12, torch.rand(999) < 0.7
    keep, entropy_keep, low, high = agreement_masks_reference(std, mask)
    want = oracle(std, mask, 0.2, 0.2)
    np.testing.assert_array_equal(keep.cpu().numpy(), want[0])
    np.testing.assert_array_equal(entropy_keep.cpu().numpy(), want[1])
    assert (low.item(), high.item()) == want[2:]


def test_the_shares_are_those_asked_for(backend):
    std, mask = torch.randperm(1000).float(), torch.ones(1000, dtype=torch.bool)
    out = run(std, mask, 0.2, 0.1, backend)
    assert torch.equal(out.advantage_keep, std >= 200)
    assert torch.equal(out.entropy_keep, std < 900)
    assert (out.low.item(), out.high.item()) == (200, 899)


@pytest.mark.parametrize(("fraction", "n"), [(0.29, 100), (0.57, 100), (0.07, 300), (0.000001, 10**6), (0.1 + 0.2, 10)])
def test_the_rank_is_exact(backend, fraction, n):
    """0.29 * 100 is 28.999999999999996 in float64, and 0.1 + 0.2 is more than 0.3."""
    if backend == "triton" and INTERPRETED and n > 1000:
        pytest.skip("takes seconds in Triton's interpreter")
    std, mask = torch.arange(n).float(), torch.ones(n, dtype=torch.bool)
    out = run(std, mask, fraction, fraction, backend)
    rank = int(Fraction(f"{fraction:.6f}") * n)
    assert (out.low.item(), out.high.item()) == (rank, n - 1 - rank)
    assert (~out.advantage_keep).sum() == rank == (~out.entropy_keep).sum()


def test_ranks_past_two_to_the_24(backend):
    """More tokens than torch.quantile takes, and ranks that go wrong if taken in float32."""
    if backend == "triton" and INTERPRETED:
        pytest.skip("takes minutes in Triton's interpreter")
    n = 2**24 + 7
    std, mask = torch.arange(n, dtype=torch.int32).view(torch.float32), torch.ones(n, dtype=torch.bool)
    for k, h in ((0, 0), (999_999, 700_001)):  # millionths
        out = run(std, mask, k / 1e6, h / 1e6, backend)
        low, high = k * n // 10**6, n - 1 - h * n // 10**6
        assert (out.low.view(torch.int32).item(), out.high.view(torch.int32).item()) == (low, high)
        assert (out.advantage_keep.sum(), out.entropy_keep.sum()) == (n - low, high + 1)


def test_critics_that_agree_mask_nothing(backend):
    mask = torch.rand(200) < 0.5
    for std in (torch.zeros(200), torch.full((200,), 0.3)):
        out = run(std, mask, 0.9, 0.9, backend)
        assert torch.equal(out.advantage_keep, mask)
        assert torch.equal(out.entropy_keep, mask)


def test_fraction_zero_drops_nothing(backend):
    std, mask = make("heavy", 300), torch.rand(300) < 0.5
    out = run(std, mask, 0, 0.0, backend)
    assert torch.equal(out.advantage_keep, mask)
    assert torch.equal(out.entropy_keep, mask)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (5,), (2, 3)])
def test_no_valid_token(backend, shape):
    out = run(torch.full(shape, torch.nan), torch.zeros(shape, dtype=torch.bool), 0.2, 0.2, backend)
    assert not out.advantage_keep.any()
    assert not out.entropy_keep.any()
    assert out.advantage_keep.shape == out.entropy_keep.shape == shape
    assert out.low.item() == out.high.item() == 0


def test_one_valid_token(backend):
    std = torch.full((9,), torch.nan)
    std[4] = 0.7
    mask = std.isfinite()
    out = run(std, mask, 0.9, 0.9, backend)
    assert torch.equal(out.advantage_keep, mask)
    assert torch.equal(out.entropy_keep, mask)
    assert torch.equal(torch.stack([out.low, out.high]), std[[4, 4]])


@pytest.mark.parametrize(
    "poison", [signed_nan(1), signed_nan(-1), *torch.tensor([torch.inf, -torch.inf, 0.0, -1.0, 3e38])], ids=str
)
def test_masked_tokens_are_not_read(backend, poison):
    std, mask = make("uniform", 20, 30), torch.rand(20, 30) < 0.5
    assert equal(run(std, mask, 0.3, 0.3, backend), run(std.where(mask, poison), mask, 0.3, 0.3, backend))


def test_negative_zero_is_zero(backend):
    std, mask = torch.rand(400), torch.ones(400, dtype=torch.bool)
    std[:200] = 0
    signed = std.clone()
    signed[:100] = -0.0
    for fraction in (0.0, 0.2, 0.4, 0.6, 0.9):
        out = run(signed, mask, fraction, fraction, backend)
        assert equal(out, run(std, mask, fraction, fraction, backend))
        assert not out.low.signbit()
        assert not out.high.signbit()


def test_infinite_std(backend):
    std, mask = torch.rand(100), torch.ones(100, dtype=torch.bool)
    std[::2] = torch.inf
    for fractions in ((0.2, 0.2), (0.7, 0.7)):
        check(run(std, mask, *fractions, backend), oracle(std, mask, *fractions))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_at_a_valid_token_ranks_highest_and_is_kept(backend, sign):
    """What 0/0 yields on x86 has its sign bit set."""
    std = torch.arange(10).float()
    std[3] = signed_nan(sign)
    out = run(std, torch.ones(10, dtype=torch.bool), 0.2, 0.2, backend)
    assert (out.low.item(), out.high.item()) == (2, 8)  # sorted: 0 1 2 4 5 6 7 8 9 nan
    assert (~out.advantage_keep).nonzero().flatten().tolist() == [0, 1]
    assert (~out.entropy_keep).nonzero().flatten().tolist() == [9]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_std(backend, dtype):
    std, mask = make("uniform", 500).to(dtype), torch.rand(500) < 0.8
    check(run(std, mask, 0.25, 0.25, backend), oracle(std, mask, 0.25, 0.25))


def test_strided_inputs(backend):
    std, mask = make("uniform", 30, 20), torch.rand(30, 20) < 0.6
    out = run(std.T, mask.T.contiguous(), 0.2, 0.2, backend)
    check(out, oracle(std.T, mask.T, 0.2, 0.2))
    assert equal(out, run(std.T.contiguous().requires_grad_(), mask.T, 0.2, 0.2, backend))


def test_launches(backend, world_of_one, count_launches):
    """Beside them, with a group, one launch of torch's zeroes the counts of each level."""
    if backend == "torch":
        pytest.skip("kernels of Triton are counted")
    for n in (0, 1, 5000):
        std, mask = torch.rand(n), torch.rand(n) < 0.5
        names = [name for name, _ in count_launches(partial(run, std, mask, 0.2, 0.3, backend))]
        inner = ["count_kernel"] * (TRITON_LEVELS - 1)
        assert names == ["begin_kernel", "count_all_kernel", *inner, "apply_kernel"]
        launches = count_launches(partial(run, std, mask, 0.2, 0.3, backend, group=world_of_one))
        assert [name for name, _ in launches] == names
    assert [grid for _, grid in launches] == [(1,), (2,), (3,), (3,), (3,), (2,)]


@pytest.mark.parametrize("kind", KINDS)
def test_any_launch_geometry(backend, kind, monkeypatch):
    """Programs that walk several blocks, and one block for all: the same bits."""
    if backend != "triton":
        pytest.skip("the torch form has none")
    from asyppo_kernels.agreement_masks import triton_form

    assert (triton_form.LEVELS, tuple(map(triton_form.width, range(4)))) == (TRITON_LEVELS, TRITON_WIDTHS)
    std, mask = make(kind, 1500), torch.rand(1500) < 0.7
    want = run(std, mask, 0.2, 0.3, backend)
    for block, inner_block, programs in ((256, 512, 2), (512, 256, 528), (2048, 2048, 1)):
        monkeypatch.setattr(triton_form, "BLOCK", block)
        monkeypatch.setattr(triton_form, "INNER_BLOCK", inner_block)
        monkeypatch.setattr(triton_form, "PROGRAMS", programs)
        assert equal(run(std, mask, 0.2, 0.3, backend), want)


@pytest.mark.parametrize("span", [(0x3F000000, 0x3F000000), (0, 0x7FFFFFFF), (0x3E800001, 0x3E900000), (0x7F800000, 1)])
@pytest.mark.parametrize("kind", ["uniform", "ties"])
def test_any_sample(backend, kind, span, monkeypatch):
    """What the sample missed, and the whole range of keys if it missed everything, are found as well."""
    if backend != "triton":
        pytest.skip("the torch form takes none")
    from asyppo_kernels.agreement_masks import triton_form

    real = triton_form._begin

    def misled(*args: object) -> tuple[Tensor, Tensor]:
        counts, state = real(*args)
        return counts, state.copy_(torch.tensor([-span[0], span[1]]))

    monkeypatch.setattr(triton_form, "_begin", misled)
    std, mask = make(kind, 300), torch.rand(300) < 0.7
    std[:30] = torch.nan
    for fractions in ((0.0, 0.2), (0.9, 0.95)):
        out = run(std, mask, *fractions, backend)
        ranked = std.where(~std.isnan(), torch.inf)
        want = oracle(ranked, mask, *fractions)
        assert (out.low.nan_to_num(torch.inf).item(), out.high.nan_to_num(torch.inf).item()) == want[2:]
        np.testing.assert_array_equal(out.advantage_keep.cpu().numpy(), want[0])
        np.testing.assert_array_equal(out.entropy_keep.cpu().numpy(), want[1] | (mask & std.isnan()).cpu().numpy())


STD = st.one_of(st.floats(0, width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 0.25, 1.0, float("inf")]))
TOKENS = st.lists(st.tuples(STD, st.booleans()), max_size=60)
FRACTION = st.one_of(st.integers(0, 999_999).map(lambda ppm: ppm / 1e6), st.integers(0, 19).map(lambda i: i / 20))


def check_any(backend: str, tokens: list[tuple[float, bool]], k: float, h: float) -> None:
    std = torch.tensor([s for s, _ in tokens], dtype=torch.float32)
    mask = torch.tensor([m for _, m in tokens], dtype=torch.bool)
    check(run(std, mask, k, h, backend), oracle(std, mask, k, h))


@given(tokens=TOKENS, k=FRACTION, h=FRACTION)
@settings(max_examples=30, deadline=None)
def test_any_tokens(backend, tokens, k, h):
    check_any(backend, tokens, k, h)


@pytest.mark.slow
def test_many_tokens(backend):
    @given(tokens=TOKENS, k=FRACTION, h=FRACTION)
    @settings(max_examples=300 if backend == "triton" and INTERPRETED else 3000, deadline=None)
    def check_many(tokens: list[tuple[float, bool]], k: float, h: float) -> None:
        check_any(backend, tokens, k, h)

    check_many()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(backend, dynamic):
    def step(std: Tensor, mask: Tensor, fraction: float) -> AgreementMasks:
        return run(std.sqrt(), mask, fraction, fraction / 2, backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, fraction in ((50, 0.2), (81, 0.35)):
        std, mask = make("uniform", 2, n), torch.rand(2, n) < 0.5
        assert equal(compiled(std, mask, fraction), step(std, mask, fraction))


def test_opcheck(backend):
    std, mask = make("uniform", 6, 9), torch.rand(6, 9) < 0.5
    if backend == "triton":
        torch.library.opcheck(_triton_op.registered, (std, mask, 200_000, 100_000))
        torch.library.opcheck(_triton_op.registered, (std.bfloat16(), mask.T.contiguous().T, 0, 0))
        torch.library.opcheck(_triton_span_op.registered, (std, mask))
        state = _triton_span_op(std, mask)
        torch.library.opcheck(_triton_count_all_op.registered, (std, mask, state))
        counts = _triton_count_all_op(std, mask, state)
        for level in range(1, TRITON_LEVELS):
            torch.library.opcheck(_triton_count_op.registered, (std, mask, counts, state, level, 200_000, 100_000))
            counts, state = _triton_count_op(std, mask, counts, state, level, 200_000, 100_000)
        torch.library.opcheck(_triton_apply_op.registered, (std, mask, counts, state, 200_000, 100_000))
        return
    state = torch.zeros(2, 2, dtype=torch.int64)
    for level in range(len(torch_form.SHIFTS)):
        torch.library.opcheck(_count_op.registered, (std, mask, state, level))
        counts = _count_op(std, mask, state, level)
        torch.library.opcheck(_descend_op.registered, (counts, state, level, 200_000, 100_000))
        state = _descend_op(counts, state, level, 200_000, 100_000)
    torch.library.opcheck(_apply_op.registered, (std, mask, state))
    torch.library.opcheck(_apply_op.registered, (std.bfloat16(), mask.T.contiguous().T, state))


def test_a_distributed_tensor_is_refused(backend, world_of_one):
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    std, mask = torch.rand(4), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="std: got a DTensor, needs a plain tensor"):
        agreement_masks(dist.tensor.distribute_tensor(std, mesh), mask, backend=backend)
    with pytest.raises(ValueError, match="mask: got a DTensor, needs a plain tensor"):
        agreement_masks(std, dist.tensor.distribute_tensor(mask, mesh), backend=backend)


def test_errors_name_the_argument(backend):
    std, mask = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for arguments, message in [
        (([0.5], mask), "std: got list"),
        ((std.double(), mask), "std: got dtype torch.float64"),
        ((std, mask[:1]), r"mask: got shape \[1, 3\], needs the shape of std"),
        ((std, mask.flatten()), r"mask: got shape \[6\]"),
        ((std, mask.int()), "mask: got dtype torch.int32"),
        ((std, mask.to("meta")), "mask: got device meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            agreement_masks(*arguments, backend=backend)
    for name in ("advantage_fraction", "entropy_fraction"):
        for number in (-0.1, 1, 1.0, 0.9999999, float("nan"), "0.2"):
            with pytest.raises(ValueError, match=rf"{name}: got .*needs a fraction in \[0, 1\)"):
                agreement_masks(std, mask, **{name: number}, backend=backend)
    for group in (0, "default"):
        with pytest.raises(ValueError, match=r"group: got .*needs a torch\.distributed\.ProcessGroup"):
            agreement_masks(std, mask, group=group, backend=backend)


@pytest.fixture
def world_of_one(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_of_one_rank_changes_nothing(backend, world_of_one):
    for n in (0, 1, 500):
        std, mask = make("heavy", n), torch.rand(n) < 0.7
        alone = run(std, mask, 0.2, 0.3, backend)
        assert equal(alone, run(std, mask, 0.2, 0.3, backend, group=world_of_one))
        compiled = torch.compile(agreement_masks, fullgraph=True, backend="aot_eager")
        out = compiled(std, mask, advantage_fraction=0.2, entropy_fraction=0.3, group=world_of_one, backend=backend)
        assert equal(alone, out)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_on_the_whole_batch(backend, world, tmp_path):
    """However tokens are divided, every rank's share is its part of what one process finds for all of them."""
    cases = []
    for kind in ("heavy", "close", "ties") if backend == "triton" and INTERPRETED else KINDS:
        for sizes in ([40] * world, [0] + [150] * (world - 1), [1] + [0] * (world - 1), [0] * world):
            for k, h in FRACTIONS:
                std = make(kind, sum(sizes))
                mask = torch.rand(sum(sizes)) < 0.7
                shards = list(zip(std.split(sizes), mask.split(sizes), strict=True))
                fractions = {"advantage_fraction": k, "entropy_fraction": h}
                shards = [tuple(x.clone() for x in shard) for shard in shards]
                cases.append({"shards": shards, "fractions": fractions, "compiled": k == 0.2, "backend": backend})
    torch.save(cases, tmp_path / "cases.pt")
    script = str(Path(__file__).with_name("agreement_rank.py"))
    ranks = [subprocess.Popen([sys.executable, script, str(r), str(world), str(tmp_path)]) for r in range(world)]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
    results = [torch.load(tmp_path / f"rank{r}.pt") for r in range(world)]
    for case, parts in zip(cases, zip(*results, strict=True), strict=True):
        std, mask = (torch.cat(x) for x in zip(*case["shards"], strict=True))
        k, h = case["fractions"].values()
        want = oracle(std, mask, k, h)
        for part in parts:
            assert (part[2].item(), part[3].item()) == want[2:]
        keep, entropy_keep = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        check(AgreementMasks(keep, entropy_keep, *parts[0][2:]), want)
