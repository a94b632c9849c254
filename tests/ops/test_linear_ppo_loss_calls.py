"""``linear_ppo_loss`` under autocast, ``torch.library`` and ``torch.compile``, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from asyppo_kernels import LinearPPOLoss, linear_ppo_loss
from tests.ops.policy_head import BACKENDS
from tests.ops.ppo_loss_oracle import EVERYTHING, make, results

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


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


@pytest.mark.parametrize(("dynamic", "compact"), [(False, False), (True, True)])
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
