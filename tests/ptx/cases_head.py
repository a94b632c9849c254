"""The cases of the policy head's ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import asyppo_kernels as ops
from asyppo_kernels.linear_logprob.reference import linear_logprob_reference
from asyppo_kernels.linear_ppo_loss.reference import linear_ppo_loss_reference
from tests.ptx.case import BF16, F16, F32, Call, Case, Inputs, Results, leaf

BLOCK = "_policy_head_kernels.MAX_BLOCK"  # columns a block
WORKSPACE = "_policy_head.CPU_WORKSPACE_BYTES"
EVERYTHING: dict[str, Any] = {"bias": BF16, "softcap": 15.0, "kl": 0.05, "dual_clip": 1.3}


def head(
    inputs: Inputs, n: int, h: int, v: int, dtype: torch.dtype, bias: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Hidden, weight, target and bias.

    Among the targets is the last token of the vocabulary, and one in the block whose gradient is written last, by
    another warp than puts the target right: one barrier alone keeps these two stores in order.
    """
    hidden, weight = inputs.normal(n, h).to(dtype), (inputs.normal(v, h) / h**0.5 * 2).to(dtype)
    target = inputs.integers(v, n)
    target[-1] = min(300, v - 1)
    target[0] = v - 1
    return hidden, weight, target, None if bias is None else inputs.normal(v).to(bias)


def linear_ppo_loss(
    n: int = 7,
    h: int = 24,
    v: int = 5003,
    dtype: torch.dtype = BF16,
    bias: torch.dtype | None = None,
    bias_offset: int = 0,
    kl: float = 0.0,
    entropy_coef: float = 0.01,
    softcap: float | None = None,
    dual_clip: float | None = None,
    all_live: bool = False,
    all_clipped: bool = False,
    no_grad: bool = False,
    **options: Any,
) -> Call:
    """Rows that are ignored, that have no weight and no advantage, unless ``all_live``."""
    inputs = Inputs()
    hidden, weight, target, bias_values = head(inputs, n, h, v, dtype, bias)
    advantage, token_weight = inputs.normal(n), inputs.uniform(n) / n
    if not all_live:
        target[1], token_weight[2], advantage[-2] = -100, 0.0, 0.0
    keep_advantage = None if all_live else inputs.uniform(n) < 0.8
    keep_entropy = None if all_live else inputs.uniform(n) < 0.7
    exact = [None if x is None else x.double() for x in (hidden, weight, bias_values)]
    logprob = linear_logprob_reference(*exact[:2], target, bias=exact[2], softcap=softcap).logprob.float()
    old, ref = logprob + 0.3 * inputs.normal(n), logprob + 0.3 * inputs.normal(n)
    rollout_weight = inputs.uniform(n) + 0.5
    if all_clipped:
        advantage, old = advantage.abs(), old - 1
    live = (token_weight != 0) & (target != -100)
    moves = advantage != 0 if keep_advantage is None else (advantage != 0) & keep_advantage
    if options.get("dead_row_stats") is False:
        assert entropy_coef == kl == 0, "then a row is live by its advantage alone"
        live &= moves

    def call(backend: str, cast: torch.dtype | None = None) -> Results:
        def to(x: Tensor | None) -> Tensor | None:
            return x if x is None or cast is None or not x.is_floating_point() else x.to(cast)

        leaves = {"hidden": leaf(hidden, cast), "weight": leaf(weight, cast)}
        if bias_values is not None:
            leaves["bias"] = leaf(bias_values, cast, bias_offset)
        rows = {
            "advantage_keep": keep_advantage,
            "entropy_keep": keep_entropy,
            "rollout_weight": to(rollout_weight),
            "ref_logprob": to(ref) if kl else None,
        }
        numbers = {"softcap": softcap, "dual_clip": dual_clip, "entropy_coef": entropy_coef, "kl_coef": kl}
        function = linear_ppo_loss_reference if backend == "reference" else ops.linear_ppo_loss
        arguments = rows | numbers | ({} if backend == "reference" else options | {"backend": backend})
        with torch.set_grad_enabled(not no_grad or backend == "reference"):
            out = function(
                leaves["hidden"],
                leaves["weight"],
                target,
                *(to(x) for x in (old, advantage, token_weight)),
                bias=leaves.get("bias"),
                **arguments,
            )
        statistics = {name: getattr(out, name) for name in ("logprob", "entropy", "ratio", "clipped")}
        if options.get("dead_row_stats") is False:
            statistics = {name: x.masked_fill(~live, 0) for name, x in statistics.items()}
        if no_grad:
            return {"loss": out.loss.detach(), **statistics}
        out.loss.backward()
        return {"loss": out.loss.detach(), **statistics} | {f"d_{name}": x.grad for name, x in leaves.items()}

    return call


def linear_logprob(
    n: int = 7,
    h: int = 24,
    v: int = 5003,
    dtype: torch.dtype = BF16,
    bias: torch.dtype | None = None,
    entropy: bool = True,
    softcap: float | None = None,
    temperature: float = 1.0,
    all_live: bool = False,
    **options: Any,
) -> Call:
    """A row that is ignored and one without an upstream gradient, unless ``all_live``."""
    inputs = Inputs()
    hidden, weight, target, bias_values = head(inputs, n, h, v, dtype, bias)
    upstream = inputs.normal(2, n)
    if not all_live:
        target[1] = -100
        upstream[:, 2] = 0

    def call(backend: str, cast: torch.dtype | None = None) -> Results:
        leaves = {"hidden": leaf(hidden, cast), "weight": leaf(weight, cast)}
        if bias_values is not None:
            leaves["bias"] = leaf(bias_values, cast)
        function = linear_logprob_reference if backend == "reference" else ops.linear_logprob
        out = function(
            leaves["hidden"],
            leaves["weight"],
            target,
            bias=leaves.get("bias"),
            softcap=softcap,
            temperature=temperature,
            entropy=entropy,
            **({} if backend == "reference" else options | {"backend": backend}),
        )
        loss, results = (out.logprob * upstream[0]).sum(), {"logprob": out.logprob.detach()}
        if entropy:
            loss, results = loss + (out.entropy * upstream[1]).sum(), results | {"entropy": out.entropy.detach()}
        loss.backward()
        return results | {f"d_{name}": x.grad for name, x in leaves.items()}

    return call


def loss(
    name: str,
    block: int = 1024,
    quick: bool = False,
    workspace: int | None = None,
    **arguments: Any,
) -> Case:
    """Of ``linear_ppo_loss``, by default in blocks of 1,024 columns."""
    if workspace is not None:
        arguments["workspace_bytes"] = workspace
    return Case("linear_ppo_loss", name, linear_ppo_loss, arguments, {BLOCK: block}, quick)


def logprob(name: str, block: int = 1024, quick: bool = False, workspace: int | None = None, **arguments: Any) -> Case:
    """Of ``linear_logprob``; a small workspace cuts the vocabulary into slices."""
    settings = {BLOCK: block} | ({} if workspace is None else {WORKSPACE: workspace})
    return Case("linear_logprob", name, linear_logprob, arguments, settings, quick)


CASES = [
    # First, since the barriers of a kernel are left out in the first case that has it, and here all are needed.
    loss("600 rows, two blocks", n=600, h=4, v=5, quick=True),
    loss("600 rows, two blocks, KL", n=600, h=4, v=5, kl=0.05, quick=True),
    loss("600 rows, two blocks, no entropy", n=600, h=4, v=5, entropy_coef=0.0, quick=True),
    loss("V = 101, one block", v=101, quick=True),
    loss("V = 20, fp32", v=20, dtype=F32),
    loss("V = 1", v=1, quick=True),
    loss("V = 16,421, blocks as on a GPU", 8192, v=16421, n=4, h=16, quick=True),
    loss("V = 16,421, blocks as on a GPU, everything", 8192, v=16421, n=4, h=16, **EVERYTHING, quick=True),
    loss("V = 8,193, a last block of one column", 8192, v=8193, n=4, h=16),
    loss("V = 5,003", quick=True),
    loss("V = 5,003, blocks of 2,048, everything", 2048, **EVERYTHING),
    loss("V = 4,096, no odd block", v=4096),
    loss("V = 5,003, fp32, everything", dtype=F32, **EVERYTHING | {"bias": F32}, quick=True),
    loss("V = 5,003, fp16, bias at an odd address", dtype=F16, bias=F16, bias_offset=1),
    loss("V = 5,003, bf16 logits", logits_dtype=BF16, quick=True),
    loss("V = 5,003, fp16, bf16 logits", dtype=F16, logits_dtype=BF16),
    loss("V = 3,001, not compact", v=3001, compact=False),
    loss("V = 3,001, not compact, several chunks", v=3001, n=11, compact=False, workspace=50_000),
    loss("V = 3,001, several chunks", v=3001, n=11, workspace=50_000),
    loss("V = 3,001, live rows only", v=3001, n=11, dead_row_stats=False, entropy_coef=0.0),
    loss("V = 3,001, all rows live, several chunks", v=3001, n=11, all_live=True, workspace=50_000),
    loss("V = 5,003, without a gradient, everything", no_grad=True, **EVERYTHING),
    loss("V = 5,003, all clipped, no entropy", entropy_coef=0.0, all_clipped=True, quick=True),
    loss("V = 5,003, fp32, all clipped, no entropy", dtype=F32, entropy_coef=0.0, all_clipped=True),
    logprob("V = 101, one block", v=101),
    logprob("V = 16,421, blocks as on a GPU", 8192, v=16421, n=4, h=16, quick=True),
    logprob(
        "V = 16,421, bias, softcap", 8192, v=16421, n=4, h=16, bias=BF16, softcap=20.0, temperature=0.7, quick=True
    ),
    logprob("V = 5,003, slices of the vocabulary", workspace=30_000, quick=True),
    logprob("V = 5,003, slices, fp32 bias", 512, workspace=30_001, bias=F32, softcap=20.0),
    logprob("V = 5,003, no entropy", entropy=False),
    logprob("V = 5,003, fp16", 2048, dtype=F16),
    logprob("V = 5,003, fp32", 2048, dtype=F32),
    logprob("V = 5,003, bf16 logits", logits_dtype=BF16, quick=True),
]
