"""``linear_logprob`` under autocast, ``torch.library`` and ``torch.compile``, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from asyppo_kernels import linear_logprob
from tests.ops.logprob_oracle import make
from tests.ops.policy_head import BACKENDS, leaves

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def test_autocast_does_not_reach_inside(backend: str) -> None:
    data = make(9, 16, 101)
    want = linear_logprob(**data, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprob(**data, backend=backend)
        grad = torch.autograd.grad(out.logprob.sum(), data["hidden"])[0]
    assert torch.equal(out.logprob, want.logprob)
    assert torch.equal(grad, torch.autograd.grad(want.logprob.sum(), data["hidden"])[0])


def test_second_derivative_is_refused(backend: str) -> None:
    data = make(4, 3, 5)
    (grad,) = torch.autograd.grad(
        linear_logprob(**data, backend=backend).logprob.sum(), data["hidden"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "entropy", "softcap"), [(True, True, 4.0), (False, False, None)])
def test_opcheck(backend: str, dtype: torch.dtype, bias: bool, entropy: bool, softcap: float | None) -> None:
    data = make(6, 4, 11, dtype)
    compute_dtype = torch.bfloat16 if bias else dtype
    b = data["bias"] if bias else None
    head = (1.3, softcap)
    inputs = (data["hidden"], data["weight"], data["target"], b)
    torch.library.opcheck(
        torch.ops.asyppo.linear_logprob.default,
        (*inputs, *head, entropy, torch.float32, compute_dtype, backend, bias and backend == "torch"),
    )
    inputs = tuple(None if x is None else x.detach() for x in inputs)
    rows = torch.rand(4, 6).unbind()
    kept = -torch.rand(6 if bias and backend == "torch" else 0, 11)
    grads = (rows[3], torch.rand(6) if entropy else None)
    torch.library.opcheck(
        torch.ops.asyppo.linear_logprob_backward.default,
        (*inputs, *rows[:3], kept, *grads, *head, torch.float32, compute_dtype, backend, True, entropy, bias),
    )


@pytest.mark.parametrize(("dynamic", "compute_dtype"), [(False, None), (True, None), (False, torch.bfloat16)])
def test_compiles_without_graph_breaks(backend: str, dynamic: bool, compute_dtype: torch.dtype | None) -> None:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> Tensor:
        options = {"temperature": 0.9, "softcap": 20.0, "compute_dtype": compute_dtype}
        out = linear_logprob(hidden * 2, weight, target, bias=bias, **options, backend=backend)
        return (out.logprob * torch.arange(len(target))).sum() + out.entropy.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (6, 9) if dynamic else (6,):
        data = make(n, 4, 11)
        want, got = loss(**data), compiled(**data)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, leaves(data)), torch.autograd.grad(want, leaves(data)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(4)}, r"hidden: got shape \[4\], needs \[N, H\]"),
        ({"hidden": torch.randn(4, 3, dtype=torch.float64)}, "hidden: got dtype torch.float64, needs"),
        ({"weight": torch.randn(5, 2)}, r"weight: got shape \[5, 2\], needs \[V, H\] = \[V, 3\]"),
        ({"weight": torch.randn(5, 3).bfloat16()}, "weight: got dtype torch.bfloat16, needs torch.float32"),
        ({"weight": torch.randn(0, 3)}, r"weight: got shape \[0, 3\], needs"),
        ({"weight": torch.randn(5, 3, device="meta")}, "weight: got device meta, needs c"),
        ({"weight": [1.0]}, "weight: got list, needs a tensor"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target: got shape \[3\], needs \[N\] = \[4\]"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, "target: got dtype torch.int32, needs torch.int64"),
        ({"bias": torch.zeros(4)}, r"bias: got shape \[4\], needs \[V\] = \[5\]"),
        ({"bias": torch.zeros(5, dtype=torch.int64)}, "bias: got dtype"),
        ({"temperature": 0.0}, "temperature: got 0.0, needs a number above 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"softcap": -1.0}, "softcap: got -1.0, needs a number above 0"),
        ({"softcap": 0}, "softcap: got 0, needs"),
        ({"compute_dtype": torch.float64}, "compute_dtype: got torch.float64, needs torch.float32 or"),
        (
            {"compute_dtype": torch.float16, "hidden": torch.randn(4, 3).bfloat16()},
            "hidden: got dtype torch.bfloat16, needs torch.float16 or torch.float32",
        ),
        (
            {"compute_dtype": torch.float32, "weight": torch.randn(5, 3).bfloat16()},
            "weight: got dtype torch.bfloat16, needs torch.float32$",
        ),
        ({"logits_dtype": torch.float16}, "logits_dtype: got torch.float16, needs"),
        ({"backend": "cuda"}, "backend: got 'cuda', needs"),
    ],
)
def test_errors_name_the_argument(backend: str, change: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.randn(4, 3),
        "weight": torch.randn(5, 3),
        "target": torch.zeros(4, dtype=torch.int64),
        "backend": backend,
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**arguments, **change})


def test_dtensor_is_refused_with_advice(backend: str) -> None:
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.tensor import DeviceMesh, distribute_tensor

    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    try:
        weight = distribute_tensor(torch.randn(5, 3), DeviceMesh("cpu", [0]))
        with pytest.raises(ValueError, match=r"weight: got a DTensor.*full_tensor"):
            linear_logprob(torch.randn(4, 3), weight, torch.zeros(4, dtype=torch.int64), backend=backend)
    finally:
        distributed.destroy_process_group()
