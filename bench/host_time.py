"""``python -m bench.host_time``: what a call costs the host, with no kernel behind it: a table of kernels/README.md.

A GPU runs ahead of the host only while its kernels take longer than the host's work on a call, and a layer of a critic
of half a billion parameters is made of short kernels. Here launches of Triton do nothing, for ours and for Liger's, and
tensors are so small that torch's own kernels, which cannot be left out, take next to no time on a CPU. What Triton's
launcher takes is left out with the launch: each launch of a row costs it once more, so they are counted beside.

Ours works on two critics, torch's and Liger's on one model: for two they are called twice. "Registered" is the same
call through ``torch.library``, which is how it goes under a mode or with a subclass of Tensor.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import asyppo_kernels as ours
from asyppo_kernels import _args, _registration
from bench import kernels_readme
from bench.environment import environment, load_line
from bench.registry import Absent, need
from bench.timing import interleave

CRITICS, TOKENS, WIDTH, VOCABULARY = 2, 3, 16, 11
HEADS = (4, 2, 8)  # of queries, of keys, and the dimensions of one
COLUMNS = ("ours", "registered", "torch", "Liger")
Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Row:
    """One op: a call for each column, of which a peer's may raise Absent, and what gradients are asked for."""

    name: str
    ours: Callable[[], Call]
    torch: Callable[[], Call] | None = None
    liger: Callable[[], Call] | None = None
    backward: bool = True


@dataclass
class Measured:
    """Of one row, one direction: seconds a call by column, launches of Triton a call, and why a column is missing."""

    op: str
    direction: str
    seconds: dict[str, float] = field(default_factory=dict)
    launches: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def leaf(*shape: int) -> Tensor:
    """A tensor that needs a gradient."""
    return torch.randn(shape).requires_grad_()


def norm_ours(residual: bool) -> Call:
    """Both critics' norm."""
    x, weight = leaf(CRITICS, TOKENS, WIDTH), leaf(CRITICS, WIDTH)
    more = leaf(CRITICS, TOKENS, WIDTH) if residual else None
    return lambda: ours.stacked_rms_norm(x, weight, residual=more, backend="triton")


def norm_torch(residual: bool) -> Call:
    """torch's fused norm, after the sum."""
    x, weight = leaf(TOKENS, WIDTH), leaf(WIDTH)
    if not residual:
        return lambda: [F.rms_norm(x, (WIDTH,), weight, 1e-6)]
    more = leaf(TOKENS, WIDTH)

    def run() -> list[Tensor]:
        summed = x + more
        return [F.rms_norm(summed, (WIDTH,), weight, 1e-6), summed]

    return run


def norm_liger(residual: bool) -> Call:
    """Liger's norm, or its norm with the sum."""
    ops = need("liger_kernel.ops")
    x, weight = leaf(TOKENS, WIDTH), leaf(WIDTH)
    if not residual:
        return lambda: [ops.LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)]
    more = leaf(TOKENS, WIDTH)
    return lambda: ops.LigerFusedAddRMSNormFunction.apply(x, more, weight, 1e-6, 0.0, "llama", False)


def heads(*leading: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys of TOKENS tokens, cosine and sine."""
    q_heads, k_heads, d = HEADS
    angle = torch.randn(TOKENS, d)
    return leaf(*leading, TOKENS, q_heads, d), leaf(*leading, TOKENS, k_heads, d), angle.cos(), angle.sin()


def rope_ours() -> Call:
    """Norm and rotation of both critics' heads."""
    q, k, cos, sin = heads(CRITICS)
    weights = {"q_weight": leaf(CRITICS, HEADS[2]), "k_weight": leaf(CRITICS, HEADS[2])}
    return lambda: ours.stacked_qk_norm_rope(q, k, cos, sin, **weights, backend="triton")


def rope_torch() -> Call:
    """transformers' expressions, with torch's fused norm."""
    q, k, cos, sin = heads()
    d = HEADS[2]
    weights = leaf(d), leaf(d)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def one(x: Tensor, weight: Tensor) -> Tensor:
        y = F.rms_norm(x, (d,), weight, 1e-6)
        first, second = y.chunk(2, dim=-1)
        return y * cos + torch.cat((-second, first), dim=-1) * sin

    return lambda: [one(x, weight) for x, weight in zip((q, k), weights, strict=True)]


def rope_liger() -> Call:
    """Liger's norm of each and its rotation of both."""
    ops = need("liger_kernel.ops")
    q, k, cos, sin = heads(1)
    weights = leaf(HEADS[2]), leaf(HEADS[2])

    def run() -> Sequence[Tensor]:
        normed = [
            ops.LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False).transpose(1, 2)
            for x, weight in zip((q, k), weights, strict=True)
        ]
        return ops.LigerRopeFunction.apply(*normed, cos[None], sin[None])

    return run


def swiglu_ours() -> Call:
    """Both critics' activation."""
    gate, up = leaf(CRITICS, TOKENS, WIDTH), leaf(CRITICS, TOKENS, WIDTH)
    return lambda: [ours.stacked_swiglu(gate, up, backend="triton")]


def swiglu_torch() -> Call:
    """silu(gate) * up."""
    gate, up = leaf(TOKENS, WIDTH), leaf(TOKENS, WIDTH)
    return lambda: [F.silu(gate) * up]


def swiglu_liger() -> Call:
    """The same in one kernel."""
    function = need("liger_kernel.ops").LigerSiLUMulFunction
    gate, up = leaf(TOKENS, WIDTH), leaf(TOKENS, WIDTH)
    return lambda: [function.apply(gate, up)]


def value_ours() -> Call:
    """Both critics' values, their mean and standard deviation."""
    hidden, weight, bias = leaf(CRITICS, TOKENS, WIDTH), leaf(CRITICS, WIDTH), leaf(CRITICS)
    return lambda: ours.ensemble_value(hidden, weight, bias, backend="triton")


def value_torch() -> Call:
    """The same of both critics, as one writes it."""
    hidden, weight, bias = leaf(CRITICS, TOKENS, WIDTH), leaf(CRITICS, WIDTH), leaf(CRITICS)

    def run() -> list[Tensor]:
        value = torch.baddbmm(bias[:, None, None], hidden, weight[:, :, None]).squeeze(-1).float()
        std, mean = torch.std_mean(value.detach(), dim=0, correction=0)
        return [value, mean, std]

    return run


def gae_ours() -> Call:
    """Advantages of two rows."""
    value, reward = torch.randn(CRITICS, 2, TOKENS), torch.randn(2, TOKENS)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    return lambda: ours.ensemble_gae(value, reward, mask, backend="triton")


def masks_ours() -> Call:
    """Masks of two rows."""
    std, mask = torch.rand(2, TOKENS), torch.ones(2, TOKENS, dtype=torch.bool)
    return lambda: ours.agreement_masks(std, mask, backend="triton")


def head() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight, and targets."""
    return leaf(TOKENS, WIDTH), leaf(VOCABULARY, WIDTH), torch.randint(VOCABULARY, (TOKENS,))


def logprob_ours() -> Call:
    """Log-prob and entropy."""
    hidden, weight, target = head()
    return lambda: ours.linear_logprob(hidden, weight, target, backend="triton")


def log_softmax(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy from whole logits."""
    logp = F.log_softmax(hidden @ weight.T, dim=-1, dtype=torch.float32)
    return logp.gather(1, target[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def logprob_torch() -> Call:
    """The same from whole logits."""
    inputs = head()
    return lambda: log_softmax(*inputs)


def loss_ours() -> Call:
    """The policy loss with an entropy bonus."""
    hidden, weight, target = head()
    rows = torch.randn(TOKENS), torch.randn(TOKENS), torch.full((TOKENS,), 1 / TOKENS)
    more = {"entropy_coef": 0.01, "compact": False}  # compaction reads on the host what a kernel has counted
    return lambda: [ours.linear_ppo_loss(hidden, weight, target, *rows, **more, backend="triton").loss]


def loss_torch() -> Call:
    """The same from whole logits."""
    inputs = head()
    old, advantage, token_weight = torch.randn(TOKENS), torch.randn(TOKENS), torch.full((TOKENS,), 1 / TOKENS)

    def run() -> list[Tensor]:
        logp, entropy = log_softmax(*inputs)
        ratio = (logp - old).clamp(-20, 20).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return [-(token_weight * (surrogate + 0.01 * entropy)).sum()]

    return run


ROWS = [
    Row("stacked_rms_norm", lambda: norm_ours(False), lambda: norm_torch(False), lambda: norm_liger(False)),
    Row("stacked_rms_norm, residual", lambda: norm_ours(True), lambda: norm_torch(True), lambda: norm_liger(True)),
    Row("stacked_qk_norm_rope", rope_ours, rope_torch, rope_liger),
    Row("stacked_swiglu", swiglu_ours, swiglu_torch, swiglu_liger),
    Row("ensemble_value", value_ours, value_torch),
    Row("ensemble_gae", gae_ours, backward=False),
    Row("agreement_masks", masks_ours, backward=False),
    Row("linear_logprob", logprob_ours, logprob_torch),
    Row("linear_ppo_loss", loss_ours, loss_torch),
]


@contextlib.contextmanager
def without_kernels() -> Iterator[list[int]]:
    """Let launches of Triton do nothing, on CPU tensors too; yields a list of one number, the launches so far."""
    launches = [0]

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        launches[0] += 1

    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    with (
        patch.object(JITFunction, "run", run),
        patch.object(InterpretedFunction, "run", run),
        patch.object(_args, "INTERPRETED", True),
    ):
        yield launches


def by_registered_op(run: Callable[[], object]) -> Callable[[], None]:
    """The same call, through ``torch.library``."""

    def looked_at() -> None:
        real, _registration._somebody_looks = _registration._somebody_looks, lambda: True
        try:
            run()
        finally:
            _registration._somebody_looks = real

    return looked_at


def with_backward(call: Call) -> Callable[[], None]:
    """A call and the backward of all its outputs, for the gradients of all leaves."""
    outputs = [y for y in call() if y.grad_fn is not None]
    upstream = [torch.ones_like(y) for y in outputs]
    leaves = leaves_of(outputs)

    def run() -> None:
        torch.autograd.grad([y for y in call() if y.grad_fn is not None], leaves, upstream)

    return run


def leaves_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that the outputs' graph ends in."""
    found: dict[Any, Tensor] = {}
    todo = [y.grad_fn for y in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in found:
            continue
        if hasattr(node, "variable"):
            found[node] = node.variable
        todo += [previous for previous, _ in node.next_functions]
    return list(found.values())


def measure(row: Row, *, calls: int, budget: float) -> list[Measured]:
    """Time all columns of one row in turn. Needs ``without_kernels``."""
    built: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for column, build in zip(COLUMNS, (row.ours, row.ours, row.torch, row.liger), strict=True):
        if build is None:
            continue
        try:
            built[column] = build()
        except Absent as reason:
            absent[column] = str(reason)
    directions = ("forward", "forward + backward") if row.backward else ("forward",)
    measured = []
    for direction in directions:
        samplers, launches = {}, {}
        for column, call in built.items():
            run = call if direction == "forward" else with_backward(call)
            run = by_registered_op(run) if column == "registered" else run
            with without_kernels() as launched:
                run()
            launches[column] = launched[0]
            samplers[column] = sampler(run, calls)
        samples, failed = interleave(samplers, budget)
        for error in failed.values():
            raise error
        seconds = {column: median(taken) for column, taken in samples.items()}
        measured.append(Measured(row.name, direction, seconds, launches, absent))
    return measured


def sampler(run: Callable[[], object], calls: int) -> Callable[[], float]:
    """Seconds of the process in one call, the mean over ``calls``: what others run on the machine does not count."""

    def sample() -> float:
        begin = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - begin) / calls

    return sample


def table(measured: Sequence[Measured]) -> str:
    """Markdown: microseconds a call and launches, and how many times ours the others take."""
    lines = [
        "| op | | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    for row in measured:
        cells = []
        for column in COLUMNS:
            if column not in row.seconds:
                cells.append(row.absent.get(column, "–"))
                continue
            seconds, launches = row.seconds[column], row.launches[column]
            ratio = "" if column == "ours" else f", {seconds / row.seconds['ours']:.1f} ×"
            count = f" ({launches} launch{'es' if launches > 1 else ''})" if launches else ""
            cells.append(f"{seconds * 1e6:.0f}{ratio}{count}")
        lines.append(f"| `{row.op}` | {row.direction} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=__doc__)
    parser.add_argument(
        "--op", action="append", default=[], help="only rows that begin with this (may be repeated); README untouched"
    )
    parser.add_argument("--calls", type=int, default=100, help="calls a sample")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row and direction")
    chosen = parser.parse_args(arguments)
    rows = [row for row in ROWS if not chosen.op or row.name.startswith(tuple(chosen.op))]
    if not rows:
        parser.error(f"--op: got {', '.join(chosen.op)}, needs the beginning of one of {[row.name for row in ROWS]}")
    where = environment(torch.device("cpu"))
    torch.manual_seed(0)
    with without_kernels():
        measured = [done for row in rows for done in measure(row, calls=chosen.calls, budget=chosen.seconds)]
    versions = ", ".join(
        f"{package} {where['versions'][package]}"
        for package in ("python", "torch", "triton", "liger_kernel")
        if package in where["versions"]
    )
    threads = where["device"]["threads"]
    text = (
        "Microseconds a call on the host, the median, float32, no launches; in brackets the launches left out. "
        f"{where['device']['name']}, {threads} thread{'s' if threads > 1 else ''}; {versions}. "
        f"{load_line(where['load'])}\n\n{table(measured)}"
    )
    print(text)
    if not chosen.op:
        kernels_readme.write("host_time", "python -m bench.host_time", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
