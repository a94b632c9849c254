"""The layers of stacked critics against float64 oracles written here from their formulas, and against transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from asyppo_kernels import stacked_qk_norm_rope, stacked_rms_norm, stacked_swiglu
from asyppo_kernels.stacked_layers import qk_norm_rope, rms_norm, swiglu, triton_form
from asyppo_kernels.stacked_layers.reference import (
    stacked_qk_norm_rope_reference,
    stacked_rms_norm_reference,
    stacked_swiglu_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half a unit in the last place, relative: what rounding the exact result once costs.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
EPS = 1e-3  # large enough that leaving it out shows

backends = pytest.mark.parametrize("backend", ["torch", "triton"])
Layer = Callable[..., Sequence[Tensor]]


# The formulas, at the precision of what they are given.


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * (x.pow(2).mean(-1, keepdim=True) + EPS) ** -0.5)


def rms_norm_formula(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    summed = x if residual is None else x + residual
    return torch.stack([norm(s, w) for s, w in zip(summed, weight, strict=True)]), summed


def rotate(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None) -> Tensor:
    """One pair (i, i + D/2) of each head at a time, a rotation in the plane."""
    m, _, _, d = x.shape
    if weight is not None:
        x = torch.stack([norm(y, w) for y, w in zip(x, weight, strict=True)])
    cos, sin = (a.expand(m, -1, -1) for a in (cos, sin))
    first, second = x[..., : d // 2], x[..., d // 2 :]
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat(
        [
            first * cos[..., : d // 2] - second * sin[..., : d // 2],
            second * cos[..., d // 2 :] + first * sin[..., d // 2 :],
        ],
        dim=-1,
    )


def rope_formula(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    return rotate(q, cos, sin, q_weight), rotate(k, cos, sin, k_weight)


def swiglu_formula(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    return (gate / (1 + torch.exp(-gate)) * up,)


# The public functions, called alike.


def call_rms_norm(backend: str) -> Layer:
    return lambda x, weight, residual=None: stacked_rms_norm(x, weight, residual=residual, eps=EPS, backend=backend)


def call_rope(backend: str, cos: Tensor, sin: Tensor) -> Layer:
    return lambda q, k, q_weight=None, k_weight=None: stacked_qk_norm_rope(
        q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=EPS, backend=backend
    )


def call_swiglu(backend: str) -> Layer:
    return lambda gate, up: (stacked_swiglu(gate, up, backend=backend),)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def angles(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosine and sine of angles whose halves differ, so that it shows which half is read."""
    angle = torch.randn(shape) * 3
    return angle.cos().to(dtype), angle.sin().to(dtype)


def run(layer: Layer, inputs: Sequence[Tensor | None], upstream: Sequence[Tensor | None]) -> list[Tensor]:
    """Outputs, and gradients of the inputs for an upstream gradient of each output (None: the output is not used)."""
    outputs = layer(*inputs)
    used = [(y, g.to(y.dtype)) for y, g in zip(outputs, upstream, strict=True) if g is not None]
    leaves = [x for x in inputs if x is not None]
    grads = torch.autograd.grad([y for y, _ in used], leaves, [g for _, g in used], allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))]


def check(layer: Layer, formula: Layer, inputs: Sequence[Tensor | None], upstream: Sequence[Tensor | None]) -> None:
    """The error of each output and gradient is at most that of the formula in the inputs' precision, plus one rounding
    of the largest number (four of float32, whose sums have another order); and that one is a matter of rounding too."""
    double = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    exact = run(formula, double, upstream)
    plain = run(formula, inputs, upstream)
    got = run(layer, inputs, upstream)
    coarsest = max(ROUNDING[x.dtype] for x in inputs if x is not None)
    for result, same_precision, want in zip(got, plain, exact, strict=True):
        assert result.dtype == same_precision.dtype
        assert result.shape == want.shape
        if not want.numel():
            continue
        unit = coarsest * want.abs().max().clamp(min=1)  # all are of the size of 1, unless they cancel
        allowed = (same_precision - want).abs().max()
        assert allowed <= 16 * unit
        assert (result - want).abs().max() <= allowed + (4 if coarsest == ROUNDING[torch.float32] else 1.01) * unit


def upstreams(shape: Sequence[int], which: str) -> list[Tensor | None]:
    return [torch.randn(tuple(shape)) if which in (name, "both") else None for name in ("normed", "summed")]


SHAPES = [(1, 1, 1), (1, 7, 33), (2, 9, 32), (4, 3, 65), (2, 0, 8)]


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_matches_the_oracle(backend, shape, residual, dtype):
    m, _, h = shape
    inputs = [leaf(*shape, dtype=dtype), leaf(m, h, dtype=dtype), leaf(*shape, dtype=dtype) if residual else None]
    for which in ("normed", "summed", "both"):
        check(call_rms_norm(backend), rms_norm_formula, inputs, upstreams(shape, which))


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ["both", "none"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (1, 3, 4, 2, 6), (3, 2, 5, 1, 80), (2, 0, 2, 1, 4)])
def test_qk_norm_rope_matches_the_oracle(backend, shape, weights, dtype):
    check_rope(backend, shape, weights, dtype)


@backends
@pytest.mark.parametrize("weights", ["q", "k"])
def test_qk_norm_rope_of_one_weight(backend, weights):
    check_rope(backend, (2, 3, 2, 1, 6), weights, torch.float32)


def check_rope(backend: str, shape: Sequence[int], weights: str, dtype: torch.dtype) -> None:
    m, n, q_heads, k_heads, d = shape
    inputs = [leaf(m, n, q_heads, d, dtype=dtype), leaf(m, n, k_heads, d, dtype=dtype)]
    inputs += [leaf(m, d, dtype=dtype) if weights in (name, "both") else None for name in "qk"]
    upstream = [torch.randn(m, n, q_heads, d), torch.randn(m, n, k_heads, d)]
    cos, sin = angles(*((m, n, d) if q_heads % 2 else (n, d)), dtype=dtype)

    def formula(*x: Tensor) -> tuple[Tensor, Tensor]:
        return rope_formula(*x, cos=cos, sin=sin)

    for used in (upstream, [upstream[0], None], [None, upstream[1]]):
        check(call_rope(backend, cos, sin), formula, inputs, used)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_matches_the_oracle(backend, shape, dtype):
    inputs = [leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype)]
    check(call_swiglu(backend), swiglu_formula, inputs, [torch.randn(shape)])


def test_several_blocks_and_parts(monkeypatch):
    """Small tiles, so that small inputs take several blocks of columns and heads, and several rows to a part."""
    monkeypatch.setattr(triton_form, "TILE", 16)
    monkeypatch.setattr(triton_form, "PROGRAMS", 4)
    inputs = [leaf(2, 11, 7), leaf(2, 7), leaf(2, 11, 7)]  # two parts, of three times two rows and less
    check(call_rms_norm("triton"), rms_norm_formula, inputs, upstreams((2, 11, 7), "both"))
    check(call_swiglu("triton"), swiglu_formula, [leaf(2, 5, 19), leaf(2, 5, 19)], [torch.randn(2, 5, 19)])
    check_rope("triton", (1, 5, 3, 1, 8), "both", torch.float32)  # two heads at a time, parts of two tokens and one


def test_references_match_the_oracle():
    x, weight, residual = (t.detach().double() for t in (leaf(3, 5, 8), leaf(3, 8), leaf(3, 5, 8)))
    got = stacked_rms_norm_reference(x, weight, eps=EPS, residual=residual)
    torch.testing.assert_close(got, rms_norm_formula(x, weight, residual))
    q, k, q_weight = (t.detach().double() for t in (leaf(3, 5, 4, 6), leaf(3, 5, 2, 6), leaf(3, 6)))
    cos, sin = (a.double() for a in angles(5, 6))
    got = stacked_qk_norm_rope_reference(q, k, cos, sin, q_weight=q_weight, eps=EPS)
    torch.testing.assert_close(got, rope_formula(q, k, q_weight, cos=cos, sin=sin))
    torch.testing.assert_close((stacked_swiglu_reference(x, residual),), swiglu_formula(x, residual))


@backends
def test_a_weights_gradient_accumulates_in_float32(backend):
    """All rows pull one way, so that a running sum in bfloat16 would stall."""

    def check(gradient: Tensor, rows: Tensor) -> None:
        wide = rows.detach().double()
        unit = (wide * (wide.pow(2).mean(-1, keepdim=True) + EPS) ** -0.5).bfloat16().double()
        want = (unit * wide).sum(1)
        assert ((gradient.double() - want).abs() <= 1.01 * ROUNDING[torch.bfloat16] * want).all()

    x, weight = leaf(2, 640, 8, dtype=torch.bfloat16), leaf(2, 8, dtype=torch.bfloat16)
    normed, _ = call_rms_norm(backend)(x, weight)
    check(torch.autograd.grad(normed, weight, x.detach())[0], x)
    q = x.detach().view(2, 10, 64, 8)
    cos, sin = torch.ones(10, 8).bfloat16(), torch.zeros(10, 8).bfloat16()
    rotated, _ = call_rope(backend, cos, sin)(q, q[:, :, :1], weight)
    check(torch.autograd.grad(rotated, weight, q)[0], x)


@backends
@pytest.mark.parametrize("kinds", [(0, 1, 1), (1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 1, 1)])
def test_dtypes_promote_as_torchs(backend, kinds):
    x_dtype, residual_dtype, weight_dtype = (DTYPES[i] for i in kinds)
    inputs = [leaf(2, 5, 8, dtype=x_dtype), leaf(2, 8, dtype=weight_dtype), leaf(2, 5, 8, dtype=residual_dtype)]
    outputs = stacked_rms_norm(inputs[0], inputs[1], residual=inputs[2], backend=backend)
    assert outputs.summed.dtype == (inputs[0] + inputs[2]).dtype
    assert outputs.normed.dtype == (inputs[1][0] * outputs.summed).dtype
    check(call_rms_norm(backend), rms_norm_formula, inputs, [torch.randn(2, 5, 8), torch.randn(2, 5, 8)])

    q, k, q_weight = leaf(2, 5, 4, 6, dtype=x_dtype), leaf(2, 5, 2, 6, dtype=x_dtype), leaf(2, 6, dtype=weight_dtype)
    cos, sin = angles(5, 6, dtype=residual_dtype)

    def formula(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.to(x[0].dtype) for y in rope_formula(*x, cos=cos.to(x_dtype), sin=sin.to(x_dtype)))

    upstream = [torch.randn(q.shape), torch.randn(k.shape)]
    if cos.dtype == x_dtype:
        check(call_rope(backend, cos, sin), formula, [q, k, q_weight], upstream)
    grads = run(call_rope(backend, cos, sin), [q, k, q_weight], upstream)
    assert [g.dtype for g in grads] == [x_dtype] * 4 + [weight_dtype]


@backends
def test_float32_angles_of_low_precision_heads_are_not_rounded(backend):
    """What autocast makes: q in bfloat16, weight, cosine and sine in float32. Rounded once, at the end."""
    q, k, weight = leaf(2, 9, 3, 16, dtype=torch.bfloat16), leaf(2, 9, 1, 16, dtype=torch.bfloat16), leaf(2, 16)
    cos, sin = angles(9, 16)
    got = stacked_qk_norm_rope(q, k, cos, sin, q_weight=weight, k_weight=None, eps=EPS, backend=backend)
    unit = norm(q.detach().double(), torch.ones(16).double()).bfloat16().double()
    wants = (
        rotate(unit * weight.detach().double()[:, None, None], cos, sin, None),
        rotate(k.detach().double(), cos, sin, None),
    )
    for result, want in zip(got, wants, strict=True):
        over = (result.double() - want).abs() > 1.05 * ROUNDING[torch.bfloat16] * want.abs() + 2.0**-22
        assert over.double().mean() < 0.01  # a normalised number on the edge may be rounded either way


@backends
def test_each_critic_has_its_own_weight(backend):
    """Critic m of a stack gives to the bit what it gives alone, and takes nothing from the others' gradients."""
    x, weight, residual = leaf(3, 3, 8), leaf(3, 8), leaf(3, 3, 8)
    q, k, q_weight, k_weight = leaf(3, 3, 4, 8), leaf(3, 3, 2, 8), leaf(3, 8), leaf(3, 8)
    cos, sin = angles(3, 3, 8)
    for m in range(3):
        one = slice(m, m + 1)
        for layer, alone, inputs in (
            (call_rms_norm(backend), call_rms_norm(backend), [x, weight, residual]),
            (call_rope(backend, cos, sin), call_rope(backend, cos[one], sin[one]), [q, k, q_weight, k_weight]),
            (call_swiglu(backend), call_swiglu(backend), [x, residual]),
        ):
            upstream = [torch.zeros(y.shape) for y in layer(*inputs)]
            for g in upstream:
                g[m] = torch.randn(g.shape[1:])
            together = run(layer, inputs, upstream)
            by_itself = run(alone, [i[one].detach().requires_grad_() for i in inputs], [g[one] for g in upstream])
            for whole, part in zip(together, by_itself, strict=True):
                torch.testing.assert_close(whole[one], part, rtol=1e-6, atol=1e-6)
            for gradient in together[len(upstream) :]:
                assert not gradient[[i for i in range(3) if i != m]].any()


@backends
def test_strided_inputs(backend):
    def transposed(*shape: int) -> Tensor:
        return torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1).requires_grad_()

    def sliced(*shape: int) -> Tensor:
        return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2].requires_grad_()

    def expanded(*shape: int) -> Tensor:
        return torch.randn(shape[-1]).expand(shape)

    weight = torch.randn(9, 3).T.requires_grad_()
    inputs = [transposed(3, 7, 9), weight, sliced(3, 7, 9)]
    check(call_rms_norm(backend), rms_norm_formula, inputs, [expanded(3, 7, 9), transposed(3, 7, 9).detach()])
    check(call_rms_norm(backend), rms_norm_formula, [sliced(3, 7, 9), weight], [sliced(3, 7, 9).detach(), None])

    weights = [torch.randn(8, 3).T.requires_grad_(), sliced(3, 8)]
    cos, sin = angles(8, 3)
    inputs = [transposed(3, 3, 4, 8), sliced(3, 3, 2, 8), *weights]
    check(
        call_rope(backend, cos.T, sin.T),
        lambda *x: rope_formula(*x, cos=cos.T, sin=sin.T),
        inputs,
        [expanded(3, 3, 4, 8), sliced(3, 3, 2, 8).detach()],
    )
    check(call_swiglu(backend), swiglu_formula, [transposed(3, 7, 9), sliced(3, 7, 9)], [expanded(3, 7, 9)])


@backends
def test_parts_of_one_projection_are_read_where_they_lie(backend, monkeypatch):
    """Halves of [M, N, 2 I], and heads of [M, N, (Hq + 2 Hk) D]: no copy, and the gradients find their way back."""

    def refuse(self: Tensor, *_: Any, **__: Any) -> Tensor:
        raise AssertionError("copied")

    monkeypatch.setattr(Tensor, "contiguous", refuse)
    both = leaf(2, 5, 14)
    check(
        lambda x: call_swiglu(backend)(*x.chunk(2, dim=-1)),
        lambda x: swiglu_formula(x[..., :7], x[..., 7:]),
        [both],
        [torch.randn(2, 5, 7)],
    )
    cos, sin = angles(5, 6)

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        heads = x.view(2, 5, 8, 6)
        return heads[:, :, :4], heads[:, :, 4:6]

    check(
        lambda x: call_rope(backend, cos, sin)(*split(x)),
        lambda x: rope_formula(*split(x), cos=cos, sin=sin),
        [leaf(2, 5, 48)],
        [torch.randn(2, 5, 4, 6), torch.randn(2, 5, 2, 6)],
    )


@backends
def test_a_chain_of_norms_adds_the_gradients_of_the_residual(backend):
    """Two blocks of a transformer: summed is the next residual, so its gradient has two sources."""

    def chain(norm: Callable[..., Any]) -> Layer:
        def layers(x: Tensor, weight: Tensor, more: Tensor) -> tuple[Tensor]:
            normed, summed = norm(x, weight)
            normed, summed = norm(normed.sin(), weight, summed)
            normed, _ = norm(normed * more, weight, summed)
            return (normed,)

        return layers

    inputs = [leaf(2, 5, 8), leaf(2, 8), leaf(2, 5, 8)]
    check(chain(call_rms_norm(backend)), chain(rms_norm_formula), inputs, [torch.randn(2, 5, 8)])


@backends
def test_without_a_residual_summed_is_x(backend):
    x = leaf(2, 5, 8)
    assert stacked_rms_norm(x, leaf(2, 8), backend=backend).summed is x


@backends
def test_large_values(backend):
    """A saturated gate, rows of zeros, and rows whose squares overflow float16."""
    gate = torch.tensor([[[-200.0, 200.0, -1e30, 1e30]]]).requires_grad_()
    (out,) = call_swiglu(backend)(gate, torch.ones(1, 1, 4))
    assert torch.equal(out.detach(), torch.tensor([[[-0.0, 200.0, 0.0, 1e30]]]))
    assert torch.equal(torch.autograd.grad(out.sum(), gate)[0], torch.tensor([[[0.0, 1, 0, 1]]]))
    x = torch.zeros(1, 2, 8, dtype=torch.float16)
    x[0, 1] = 60_000
    normed = stacked_rms_norm(x, torch.ones(1, 8, dtype=torch.float16), backend=backend).normed
    assert torch.equal(normed, (x > 0).half())


@backends
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), ()])
def test_only_wanted_gradients_are_formed(backend, wanted):
    for layer, formula, shapes in (
        (call_rms_norm(backend), rms_norm_formula, [(2, 5, 4), (2, 4), (2, 5, 4)]),
        (call_rope(backend, *(a := angles(5, 4))), lambda *x: rope_formula(*x, cos=a[0], sin=a[1]), None),
    ):
        inputs = [torch.randn(s) for s in shapes or [(2, 5, 3, 4), (2, 5, 1, 4), (2, 4)]]
        for i in wanted:
            inputs[i].requires_grad_()
        outputs = layer(*inputs)
        assert any(y.requires_grad for y in outputs) == bool(wanted)
        if not wanted:
            continue
        sum(y.square().sum() for y in outputs).backward()
        assert [x.grad is not None for x in inputs] == [i in wanted for i in range(3)]
        double = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        sum(y.square().sum() for y in formula(*double)).backward()
        for i in wanted:
            torch.testing.assert_close(inputs[i].grad.double(), double[i].grad, rtol=1e-5, atol=1e-5)


def test_launches(count_launches):
    """One forward; one backward, and one more where a weight needs its gradient, of one or both weights."""

    def names(function: Callable[[], object]) -> list[str]:
        return [name for name, _ in count_launches(function)]

    def backward(outputs: Sequence[Tensor]) -> list[str]:
        return names(lambda: torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs]))

    out: list[Tensor] = []
    x, weight, residual = leaf(3, 9, 65), leaf(3, 65), leaf(3, 9, 65)
    assert names(lambda: out.extend(call_rms_norm("triton")(x, weight, residual))) == ["rms_norm_kernel"]
    assert backward(out) == ["rms_norm_backward_kernel", "add_parts_kernel"]
    out = list(call_rms_norm("triton")(x, weight.detach(), residual))
    assert backward(out) == ["rms_norm_backward_kernel"]
    assert backward(call_rms_norm("triton")(x, weight, residual)[1:]) == []  # summed alone: nothing to compute

    q, k, q_weight, k_weight = leaf(3, 2, 4, 8), leaf(3, 2, 2, 8), leaf(3, 8), leaf(3, 8)
    rope = call_rope("triton", *angles(2, 8))
    out = []
    assert names(lambda: out.extend(rope(q, k, q_weight, k_weight))) == ["qk_norm_rope_kernel"]
    assert backward(out) == ["qk_norm_rope_backward_kernel", "add_parts_kernel"]
    assert backward(rope(q, k, q_weight)) == ["qk_norm_rope_backward_kernel", "add_parts_kernel"]
    assert backward(rope(q, k)) == ["qk_norm_rope_backward_kernel"]

    out = []
    assert names(lambda: out.extend(call_swiglu("triton")(x, residual))) == ["swiglu_kernel"]
    assert backward(out) == ["swiglu_backward_kernel"]

    empty = leaf(3, 0, 65), leaf(3, 0, 65)
    out = []
    assert names(lambda: out.extend(call_swiglu("triton")(*empty))) == []
    assert backward(out) == []


def test_rows_are_cut_by_the_shape_alone(count_launches):
    """Up to 1,024 parts for all critics, each a multiple of the rows a program holds."""
    x, weight = leaf(4, 700, 64), leaf(4, 64)
    out = call_rms_norm("triton")(x, weight)[0]
    launches = count_launches(out.sum().backward)
    rows, _, _ = triton_form._row_tile(700, 64)
    assert launches == [
        ("rms_norm_backward_kernel", (-(-700 // rows), 4)),
        ("add_parts_kernel", (8, 1)),
    ]
    assert triton_form._part(700, rows, 4) == rows
    assert triton_form._part(100_000, 2, 2) == 196  # 511 parts
    assert triton_form._part(100_000, 2, 5000) == 100_000


@backends
def test_repeats_to_the_bit(backend, monkeypatch):
    monkeypatch.setattr(triton_form, "PROGRAMS", 8)
    x, weight, residual = leaf(3, 70, 33), leaf(3, 33), leaf(3, 70, 33)
    q, k, q_weight, k_weight = leaf(3, 5, 4, 8), leaf(3, 5, 2, 8), leaf(3, 8), leaf(3, 8)
    cos, sin = angles(5, 8)
    for layer, inputs in (
        (call_rms_norm(backend), [x, weight, residual]),
        (call_rope(backend, cos, sin), [q, k, q_weight, k_weight]),
        (call_swiglu(backend), [x, residual]),
    ):
        upstream = [torch.randn(y.shape) for y in layer(*inputs)]
        first, second = (run(layer, inputs, upstream) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_m_modules_of_transformers(backend, dtype):
    """Values and gradients of M separate modules; the torch form gives the norms' and rotations' to the bit."""
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = qwen3.Qwen3Config(
        hidden_size=24, intermediate_size=40, head_dim=16, num_attention_heads=4, num_key_value_heads=2
    )
    m, n, device = 3, 5, torch.get_default_device()

    def norms(size: int) -> list[torch.nn.Module]:
        modules = [kind(size, eps=EPS) for kind in (qwen3.Qwen3RMSNorm, llama.LlamaRMSNorm, qwen3.Qwen3RMSNorm)]
        for module in modules:
            torch.nn.init.normal_(module.weight)
        return [module.to(device, dtype) for module in modules]

    def stacked(modules: list[torch.nn.Module]) -> Tensor:
        return torch.stack([module.weight.detach() for module in modules]).requires_grad_()

    def compare(
        layer: Layer,
        eager: Layer,
        weights: Sequence[Sequence[torch.nn.Module]],
        *inputs: Tensor,
        exact: bool = backend == "torch",
    ) -> None:
        stacks = [stacked(modules) for modules in weights]
        outputs = layer(*inputs, *stacks)
        upstream = [torch.randn(y.shape).to(y.dtype) for y in outputs]
        got = torch.autograd.grad(outputs, [*inputs, *stacks], upstream)
        wanted: list[list[Tensor]] = [[] for _ in (*inputs, *stacks)]
        for i in range(m):
            own = [x[i].detach().requires_grad_() for x in inputs]
            modules = [stack[i] for stack in weights]
            want = eager(*own, *modules)
            for y, w in zip(outputs, want, strict=True):
                if exact:
                    assert torch.equal(y[i], w)
                else:
                    close(y[i], w)
            leaves = [*own, *(module.weight for module in modules)]
            for column, g in zip(wanted, torch.autograd.grad(want, leaves, [g[i] for g in upstream]), strict=True):
                column.append(g)
        for g, column in zip(got, wanted, strict=True):
            close(g, torch.stack(column))

    def close(got: Tensor, want: Tensor) -> None:
        assert got.dtype == want.dtype
        most = want.abs().max() * (1e-5 if dtype == torch.float32 else 2.0**-6)  # four roundings of the largest
        assert (got - want).abs().max() <= most

    def eager_norm(x: Tensor, residual: Tensor, module: torch.nn.Module) -> tuple[Tensor, Tensor]:
        summed = residual + x
        return module(summed), summed

    compare(
        lambda x, residual, weight: call_rms_norm(backend)(x, weight, residual),
        eager_norm,
        [norms(24)],
        leaf(m, n, 24, dtype=dtype),
        leaf(m, n, 24, dtype=dtype),
    )

    rotary = qwen3.Qwen3RotaryEmbedding(config).to(device)
    cos, sin = (a[0] for a in rotary(torch.zeros((), dtype=dtype), torch.arange(3, 3 + n)[None]))
    heads = leaf(m, n, 4, 16, dtype=dtype), leaf(m, n, 2, 16, dtype=dtype)

    def eager_qk(q: Tensor, k: Tensor, *modules: torch.nn.Module) -> tuple[Tensor, Tensor]:
        if modules:
            q, k = modules[0](q), modules[1](k)
        return qwen3.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)

    compare(call_rope(backend, cos, sin), eager_qk, [norms(16), norms(16)], *heads)
    compare(call_rope(backend, cos, sin), eager_qk, [], *heads)

    act_fn = llama.LlamaMLP(llama.LlamaConfig(hidden_size=24, num_attention_heads=2)).act_fn
    compare(
        call_swiglu(backend),
        lambda gate, up: (act_fn(gate) * up,),
        [],
        leaf(m, n, 40, dtype=dtype),
        leaf(m, n, 40, dtype=dtype),
        exact=False,  # torch's silu ends a tensor with another loop than it begins it
    )


@backends
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_to_one_graph(backend, dynamic):
    cos_sin = {n: angles(n, 8) for n in (5, 9)}

    def block(x: Tensor, weight: Tensor, head_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        normed, summed = stacked_rms_norm(x, weight, backend=backend)
        heads = normed.unflatten(-1, (4, 8))
        q, k = stacked_qk_norm_rope(
            heads[:, :, :2], heads[:, :, 2:], cos, sin, q_weight=head_weight, k_weight=head_weight, backend=backend
        )
        normed, summed = stacked_rms_norm(torch.cat([q, k], 2).flatten(2), weight, residual=summed, backend=backend)
        return stacked_swiglu(*normed.chunk(2, dim=-1), backend=backend), summed

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (5, 9):
        inputs = leaf(2, n, 32), leaf(2, 32), leaf(2, 8)
        results = [f(*inputs, *cos_sin[n]) for f in (compiled, block)]
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad([out[0].sum(), out[1].square().sum()], inputs) for out in results]
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_opcheck(dtype):
    x, weight, residual = leaf(2, 5, 6, dtype=dtype), leaf(2, 6, dtype=dtype), leaf(2, 5, 6)
    torch.library.opcheck(rms_norm._forward_op.registered, (x, weight, residual, EPS))
    torch.library.opcheck(rms_norm._forward_op.registered, (x.transpose(0, 1)[:2], weight[:, :6], None, EPS))
    grad, plain = torch.randn(2, 5, 6, dtype=dtype), (x.detach(), weight.detach())
    for summed, needs in ((grad, (True, True)), (None, (False, True)), (grad, (True, False))):
        torch.library.opcheck(rms_norm._backward_op.registered, (grad, summed, *plain, EPS, *needs))

    q, k, q_weight = leaf(2, 5, 3, 4, dtype=dtype), leaf(2, 5, 1, 4, dtype=dtype), leaf(2, 4, dtype=dtype)
    cos, sin = angles(5, 4, dtype=dtype)
    torch.library.opcheck(qk_norm_rope._forward_op.registered, (q, k, cos, sin, q_weight, None, EPS))
    torch.library.opcheck(qk_norm_rope._forward_op.registered, (q, k, cos, sin, None, None, EPS))
    detached = q.detach(), None, cos, sin, q_weight.detach(), None
    for needs in (True, False):
        torch.library.opcheck(qk_norm_rope._backward_op.registered, (q.detach(), k.detach(), *detached, EPS, needs))

    torch.library.opcheck(swiglu._forward_op.registered, (x, x.detach().flip(0).requires_grad_()))
    torch.library.opcheck(swiglu._backward_op.registered, (grad, x.detach(), x.detach()))


@backends
def test_under_a_checkpoint_and_without_gradients(backend):
    x, weight = leaf(2, 5, 8), leaf(2, 8)

    def block(x: Tensor, weight: Tensor) -> Tensor:
        normed, summed = stacked_rms_norm(x, weight, residual=x.sin(), backend=backend)
        return stacked_swiglu(normed, summed, backend=backend)

    with torch.no_grad():
        assert not block(x, weight).requires_grad
    plain = torch.autograd.grad(block(x, weight).sum(), [x, weight])
    again = torch.utils.checkpoint.checkpoint(block, x, weight, use_reentrant=False)
    for got, want in zip(torch.autograd.grad(again.sum(), [x, weight]), plain, strict=True):
        assert torch.equal(got, want)


@backends
def test_errors_name_the_argument(backend):
    x, weight = torch.randn(2, 5, 8), torch.randn(2, 8)
    q, k, (cos, sin) = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), angles(5, 8)
    rope = stacked_qk_norm_rope
    here = x.device.type
    for function, arguments, options, message in [
        (stacked_rms_norm, ([1.0], weight), {}, "x: got list"),
        (stacked_rms_norm, (x[0], weight), {}, r"x: got shape \[5, 8\], needs \[M, N, H\]"),
        (stacked_rms_norm, (x[:0], weight[:0]), {}, r"x: got shape \[0, 5, 8\], needs .*M >= 1"),
        (stacked_rms_norm, (x.double(), weight), {}, "x: got dtype torch.float64"),
        (stacked_rms_norm, (x, weight[:1]), {}, r"weight: got shape \[1, 8\], needs \[M, H\] = \[2, 8\]"),
        (stacked_rms_norm, (x, weight.int()), {}, "weight: got dtype torch.int32"),
        (stacked_rms_norm, (x, weight.to("meta")), {}, f"weight: got device meta, needs {here}"),
        (
            stacked_rms_norm,
            (x, weight),
            {"residual": x[:, :4]},
            r"residual: got shape \[2, 4, 8\], needs .*\[2, 5, 8\]",
        ),
        (stacked_rms_norm, (x, weight), {"eps": -1.0}, "eps: got -1.0, needs a number >= 0"),
        (rope, (q[..., :7], k[..., :7], cos, sin), {}, r"q: got shape \[2, 5, 4, 7\], needs .*D even"),
        (rope, (q[0], k, cos, sin), {}, r"q: got shape \[5, 4, 8\], needs \[M, N, Hq, D\]"),
        (rope, (q, k[..., :6], cos, sin), {}, r"k: got shape \[2, 5, 2, 6\], needs .*\[2, 5, Hk, 8\]"),
        (rope, (q, k[:, :, :0], cos, sin), {}, r"k: got shape \[2, 5, 0, 8\], needs .*Hk >= 1"),
        (rope, (q, k.bfloat16(), cos, sin), {}, "k: got dtype torch.bfloat16, needs torch.float32"),
        (rope, (q, k.to("meta"), cos, sin), {}, f"k: got device meta, needs {here}"),
        (rope, (q, k, cos[:4], sin), {}, r"cos: got shape \[4, 8\], needs \[N, D\] = \[5, 8\] or \[M, N, D\]"),
        (rope, (q, k, cos[None], sin), {}, r"cos: got shape \[1, 5, 8\]"),
        (rope, (q, k, cos, sin[:, :4]), {}, r"sin: got shape \[5, 4\], needs \[5, 8\], as cos"),
        (rope, (q, k, cos, sin.bfloat16()), {}, "sin: got dtype torch.bfloat16, needs torch.float32"),
        (rope, (q, k, cos.clone().requires_grad_(), sin), {}, "cos: got a tensor that requires a gradient"),
        (rope, (q, k, cos, sin), {"k_weight": weight[:1]}, r"k_weight: got shape \[1, 8\], needs \[M, D\] = \[2, 8\]"),
        (rope, (q, k, cos, sin), {"eps": None}, "eps: got None"),
        (stacked_swiglu, (x[0], x[0]), {}, r"gate: got shape \[5, 8\], needs \[M, N, I\]"),
        (stacked_swiglu, (x[..., :0], x[..., :0]), {}, r"gate: got shape \[2, 5, 0\], needs .*I >= 1"),
        (stacked_swiglu, (x, x[:, :4]), {}, r"up: got shape \[2, 4, 8\], needs \[M, N, I\] = \[2, 5, 8\]"),
        (stacked_swiglu, (x, x.half()), {}, "up: got dtype torch.float16, needs torch.float32"),
        (stacked_swiglu, (x, x.to_sparse()), {}, "up: got layout torch.sparse_coo"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(*arguments, **options, backend=backend)


def test_backends():
    x, weight = torch.randn(2, 5, 8), torch.randn(2, 8)
    q, k, (cos, sin) = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), angles(5, 8)
    for function, arguments in (
        (stacked_rms_norm, (x, weight)),
        (stacked_qk_norm_rope, (q, k, cos, sin)),
        (stacked_swiglu, (x, x)),
    ):
        with pytest.raises(ValueError, match="backend: got 'cuda'"):
            function(*arguments, backend="cuda")
        expected = function(*arguments, backend="triton" if x.is_cuda else "torch")
        for got, want in zip(function(*arguments), expected, strict=True):
            assert torch.equal(got, want)
