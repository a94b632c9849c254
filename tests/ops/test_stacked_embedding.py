"""The embedding of stacked critics and what they read beside it, against plain models, one critic at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from asyppo_kernels import stacked_embedding
from asyppo_kernels.stacked_layers import embedding, triton_form
from asyppo_kernels.stacked_layers.reference import stacked_embedding_reference

V = 11
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def made(
    m: int, n: int, h: int, features: int = 2, shared: str = "", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Arguments; ``shared`` names those that all critics share."""
    first = {name: 1 if name in shared else m for name in ("tokens", "weight", "inputs")}
    return {
        "tokens": torch.randint(V, (first["tokens"], n)),
        "weight": torch.randn(first["weight"], V, h).to(dtype).requires_grad_(),
        "inputs": torch.randn(first["inputs"], n, features),
        "projection": torch.randn(m, features, h).to(dtype).requires_grad_(),
    }


def formula(arguments: dict[str, Tensor], padding_idx: int | None) -> Tensor:
    """In float64, one token at a time."""
    tokens, weight, inputs, projection = (x if x.dtype == torch.int64 else x.double() for x in arguments.values())
    m, n = len(projection), tokens.shape[1]
    rows = []
    for c in range(m):
        for t in range(n):
            token = tokens[c % len(tokens), t]
            row = weight[c % len(weight), token]
            row = row.detach() if token == padding_idx else row
            read = inputs[c % len(inputs), t]
            rows.append(row + sum(x * w for x, w in zip(read, projection[c], strict=True)))
    return torch.stack(rows).view(m, n, -1) if rows else projection.new_zeros(m, 0, projection.shape[-1])


def check(arguments: dict[str, Tensor], backend: str, padding_idx: int | None = None, **options: Any) -> None:
    """Result and gradients are those of the formula, but for a few roundings of the largest number."""
    got = stacked_embedding(**arguments, padding_idx=padding_idx, backend=backend, **options)
    want = formula(arguments, padding_idx)
    assert got.dtype == options.get("dtype", arguments["weight"].dtype)
    leaves = [arguments["weight"], arguments["projection"]]
    upstream = torch.randn(want.shape).to(got.dtype)
    grads = torch.autograd.grad(got, leaves, upstream)
    pairs = [(got, want)]
    if want.numel():
        pairs += list(zip(grads, torch.autograd.grad(want, leaves, upstream.double()), strict=True))
    else:
        assert not any(bool(g.any()) for g in grads)
    for result, exact in pairs:
        if not exact.numel():
            continue
        unit = max(ROUNDING[got.dtype], ROUNDING[result.dtype]) * exact.abs().max().clamp(min=1)
        assert (result.double() - exact).abs().max() <= 4 * unit


@backends
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 100), (3, 33, 65), (2, 0, 8)])
def test_matches_the_oracle(backend, shape):
    check(made(*shape), backend)


@backends
@pytest.mark.parametrize("shared", ["tokens inputs", "weight inputs"])
def test_what_all_critics_share(backend, shared):
    check(made(3, 9, 20, shared=shared), backend, 4)


@backends
@pytest.mark.parametrize("features", [1, 3])
def test_numbers_of_features(backend, features):
    check(made(2, 9, 20, features), backend)


@backends
@pytest.mark.parametrize(
    ("dtype", "out"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_dtypes(backend, dtype, out):
    check(made(2, 9, 20, dtype=dtype), backend, dtype=out)


def test_several_blocks_and_parts(monkeypatch):
    monkeypatch.setattr(triton_form, "TILE", 16)
    monkeypatch.setattr(triton_form, "PROGRAMS", 4)
    check(made(2, 21, 19), "triton")


def test_the_reference_is_the_formula():
    arguments = made(3, 5, 8, shared="weight")
    got = stacked_embedding_reference(**{k: v if v.dtype == torch.int64 else v.double() for k, v in arguments.items()})
    torch.testing.assert_close(got, formula(arguments, None))


@backends
def test_zeros_change_no_bit(backend):
    arguments = made(2, 30, 20)
    with torch.no_grad():
        arguments["projection"].zero_()
    plain = torch.stack([table[ids] for table, ids in zip(arguments["weight"], arguments["tokens"], strict=True)])
    for dtype in ROUNDING:
        assert torch.equal(stacked_embedding(**arguments, dtype=dtype, backend=backend), plain.to(dtype))


@backends
def test_strided_inputs(backend):
    arguments = made(2, 9, 20)
    arguments["tokens"] = torch.randint(V, (9, 2)).T
    arguments["weight"] = torch.randn(V, 2, 40)[..., ::2].transpose(0, 1).requires_grad_()
    arguments["inputs"] = torch.randn(2, 2, 9).mT
    arguments["projection"] = torch.randn(2, 20, 2).mT.requires_grad_()
    check(arguments, backend, 3)


def test_launches(count_launches):
    """One forward; the sum over tokens in two, and none for a projection that wants no gradient."""
    arguments, out = made(3, 9, 65), []
    forward = count_launches(lambda: out.append(stacked_embedding(**arguments, backend="triton")))
    assert [name for name, _ in forward] == ["embedding_kernel"]
    backward = count_launches(lambda: out[0].sum().backward())
    assert [name for name, _ in backward] == ["embedding_backward_kernel", "add_parts_kernel"]
    arguments["projection"] = arguments["projection"].detach()
    out = [stacked_embedding(**arguments, backend="triton")]
    assert count_launches(lambda: out[0].sum().backward()) == []


@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.slow), "triton"])
def test_compiles_to_one_graph_and_repeats_to_the_bit(backend):
    def block(weight: Tensor, projection: Tensor, tokens: Tensor, inputs: Tensor) -> Tensor:
        return stacked_embedding(tokens, weight, inputs, projection, padding_idx=4, backend=backend).sin()

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 9):
        arguments = made(2, n, 20)
        leaves, rest = (arguments["weight"], arguments["projection"]), (arguments["tokens"], arguments["inputs"])
        results = [f(*leaves, *rest) for f in (compiled, block, block)]
        grads = [torch.autograd.grad(out.square().sum(), leaves) for out in results]
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(grads[0], grads[1])
        assert torch.equal(results[1], results[2])
        assert all(torch.equal(a, b) for a, b in zip(grads[1], grads[2], strict=True))


def test_opcheck():
    arguments = made(2, 5, 8)
    torch.library.opcheck(embedding._forward_op.registered, (*arguments.values(), 4, torch.float32))
    plain = arguments["inputs"], arguments["projection"].detach()
    torch.library.opcheck(embedding._backward_op.registered, (torch.randn(2, 5, 8), *plain))


@backends
def test_errors_name_the_argument(backend):
    good = made(2, 5, 8)
    for name, value, message in [
        ("projection", torch.randn(2, 8), r"projection: got shape \[2, 8\], needs \[M, F, H\]"),
        ("projection", torch.randn(2, 17, 8), r"projection: got shape .*, needs \[M, F, H\] with .* F of 1 to 16"),
        ("tokens", good["tokens"].int(), "tokens: got dtype torch.int32"),
        ("tokens", torch.zeros(3, 5, dtype=torch.int64), r"tokens: got shape \[3, 5\], needs a first axis of M = 2"),
        ("weight", torch.randn(2, V, 7), r"weight: got shape \[2, 11, 7\], needs \[M, V, 8\]"),
        ("inputs", torch.randn(2, 4, 2), r"inputs: got shape \[2, 4, 2\], needs \[M, N, F\] = \[2, 5, 2\] or"),
        ("inputs", torch.randn(2, 5, 2).half(), "inputs: got dtype torch.float16"),
        ("inputs", torch.randn(2, 5, 2).requires_grad_(), "inputs: got a tensor that requires a gradient"),
        ("padding_idx", V, r"padding_idx: got 11, needs None or a token in 0 \.\.\. 10"),
        ("dtype", torch.int64, "dtype: got torch.int64"),
        ("backend", "cuda", "backend: got 'cuda'"),
    ]:
        with pytest.raises(ValueError, match=message):
            stacked_embedding(**({"backend": backend} | good | {name: value}))
