"""``python -m bench.gpu_check``: what only a GPU can show, in one call of less than ten minutes.

Runs from the tree with nothing installed (PYTHONPATH=kernels:.). Each step is a process of its own with a time limit;
one that fails stops no other, and the exit status is 1 if any did.

    repeats    twenty runs of every op, bit-identical
    tests      tests/ops with the Triton forms on the device
    bench      python -m bench.run, the policy head's ops first and the trainer last, for what the others leave
    plan       ``asyppo plan`` beside the allocator's peaks, by phase of a step (``bench.planned``)
    capture    the ensemble ops, the stacked layers, and the loss without compaction, replayed from a CUDA graph
    large      rows beyond logit number 2^31, in one chunk
    small      every kernel on small shapes, compiled here so that the next two only run them
    memcheck   the same under compute-sanitizer, if there is one
    racecheck  the same for shared memory
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.ops import OPS

ROOT = Path(__file__).parents[1]
SECONDS = 570.0
REPEATS = 20
AFTER_BENCH = 310.0  # seconds
HEAD, TRAINING = ("linear_ppo_loss", "linear_logprob"), ("update", "train_step")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the CPU, in its own tests only
LIMITS = {
    "repeats": 60.0,
    "plan": 90.0,
    "capture": 60.0,
    "large": 60.0,
    "tests": 150.0,
    "small": 60.0,
    "memcheck": 60.0,
    "racecheck": 60.0,
}


def policy_loss(n: int, h: int, v: int, dtype: torch.dtype, **options: Any) -> Callable[[], list[Tensor]]:
    """A call of ``linear_ppo_loss`` and its gradients, on inputs made once."""
    from asyppo_kernels import linear_ppo_loss

    hidden = torch.randn(n, h, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, device=DEVICE) * 4 / h**0.5).to(dtype).requires_grad_()
    bias = torch.randn(v, device=DEVICE).to(dtype).requires_grad_() if options.pop("bias", False) else None
    rows = {
        "target": torch.randint(v, (n,), device=DEVICE),
        "old_logprob": -12 + torch.randn(n, device=DEVICE),
        "advantage": torch.randn(n, device=DEVICE),
        "token_weight": torch.rand(n, device=DEVICE).where(torch.rand(n, device=DEVICE) < 0.8, 0.0) / n,
        "advantage_keep": torch.rand(n, device=DEVICE) < 0.8,
        "entropy_keep": torch.rand(n, device=DEVICE) < 0.8,
        "ref_logprob": -12 + torch.randn(n, device=DEVICE),
    }
    numbers = {"clip_high": 0.28, "entropy_coef": 0.01, "kl_coef": 0.01, "dual_clip": 3.0}
    leaves = [x for x in (hidden, weight, bias) if x is not None]

    def run() -> list[Tensor]:
        out = linear_ppo_loss(hidden, weight, **rows, bias=bias, **(numbers | options), backend="triton")
        return [*out, *torch.autograd.grad(out.loss, leaves)]

    return run


def logprob(n: int, h: int, v: int, dtype: torch.dtype, **options: Any) -> Callable[[], list[Tensor]]:
    """A call of ``linear_logprob`` and its gradients, on inputs made once."""
    from asyppo_kernels import linear_logprob

    hidden = torch.randn(n, h, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, device=DEVICE) * 4 / h**0.5).to(dtype).requires_grad_()
    target = torch.randint(v, (n,), device=DEVICE)
    target[::7] = -100
    upstream = torch.randn(2, n, device=DEVICE)

    def run() -> list[Tensor]:
        out = linear_logprob(hidden, weight, target, **options, backend="triton")
        loss = (out.logprob * upstream[0] + out.entropy * upstream[1]).sum()
        return [out.logprob, out.entropy, *torch.autograd.grad(loss, [hidden, weight])]

    return run


def ensemble(k: int, b: int, t: int, h: int) -> Callable[[], list[Tensor]]:
    """Values of critics, their advantages, and the masks."""
    from asyppo_kernels import agreement_masks, ensemble_gae, ensemble_value

    hidden = torch.randn(k, b * t, h, device=DEVICE).bfloat16().requires_grad_()
    weight = torch.randn(k, h, device=DEVICE).bfloat16().requires_grad_()
    reward, mask = torch.randn(b, t, device=DEVICE), torch.rand(b, t, device=DEVICE) < 0.8

    def run() -> list[Tensor]:
        values = ensemble_value(hidden, weight, backend="triton")
        grads = torch.autograd.grad(values.value.square().sum(), [hidden, weight])
        gae = ensemble_gae(values.value.detach().view(k, b, t), reward, mask, lam=0.95, backend="triton")
        masks = agreement_masks(gae.std, mask, backend="triton")
        return [*values, *grads, *gae, *masks]

    return run


def stacked(m: int, n: int, h: int, i: int, heads: tuple[int, int, int]) -> Callable[[], list[Tensor]]:
    """The layers of stacked critics and their gradients, on inputs made once."""
    from asyppo_kernels import stacked_embedding, stacked_qk_norm_rope, stacked_rms_norm, stacked_swiglu

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).bfloat16().requires_grad_()

    q_heads, k_heads, d = heads
    x, residual, weight, both = leaf(m, n, h), leaf(m, n, h), leaf(m, h), leaf(m, n, 2 * i)
    q, k, q_weight, k_weight = leaf(m, n, q_heads, d), leaf(m, n, k_heads, d), leaf(m, d), leaf(m, d)
    cos, sin = torch.randn(2, n, d, device=DEVICE).bfloat16()
    table, projection, tokens = leaf(m, 97, h), leaf(m, 2, h), torch.randint(97, (m, n), device=DEVICE)
    read = torch.randn(m, n, 2, device=DEVICE)
    leaves = [x, residual, weight, both, q, k, q_weight, k_weight, table, projection]

    def run() -> list[Tensor]:
        out = [
            *stacked_rms_norm(x, weight, residual=residual, backend="triton"),
            *stacked_qk_norm_rope(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, backend="triton"),
            stacked_swiglu(*both.chunk(2, dim=-1), backend="triton"),
            stacked_embedding(tokens, table, read, projection, padding_idx=1, backend="triton"),
        ]
        return [*out, *torch.autograd.grad(out, leaves, [y.detach() for y in out])]

    return run


def capture() -> None:
    """What can be captured replays from a CUDA graph to the same bits; raises AssertionError otherwise."""
    torch.manual_seed(0)
    runs = {f"ensemble ops {shape}": ensemble(*shape) for shape in ((2, 64, 1024, 256), (5, 3, 5000, 96))}
    runs["stacked layers"] = stacked(2, 8192, 1024, 3072, (16, 8, 128))
    runs["linear_ppo_loss, not compact"] = policy_loss(1000, 256, 50_257, torch.bfloat16, compact=False)
    for name, run in runs.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            want = [x.clone() for x in run()]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPEATS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        print(f"{name}: captured, {begin.elapsed_time(end) / REPEATS:.3f} ms a replay", flush=True)


def repeats() -> None:
    """Every op gives the same bits each time; raises AssertionError otherwise."""
    runs = {
        "linear_ppo_loss": policy_loss(4096, 512, 151_936, torch.bfloat16),
        "linear_ppo_loss, bf16 logits": policy_loss(4096, 512, 151_936, torch.bfloat16, logits_dtype=torch.bfloat16),
        "linear_ppo_loss, float16, not compact": policy_loss(1000, 256, 50_257, torch.float16, compact=False),
        "linear_logprob": logprob(4096, 512, 151_936, torch.bfloat16),
        "ensemble ops": ensemble(2, 64, 1024, 256),
        "stacked layers": stacked(2, 8192, 1024, 3072, (16, 8, 128)),
    }
    for name, run in runs.items():
        first = run()
        same = all(torch.equal(a, b) for _ in range(REPEATS - 1) for a, b in zip(first, run(), strict=True))
        print(f"{name}: {REPEATS} runs {'bit-identical' if same else 'DIFFER'}", flush=True)
        assert same, name


def plan() -> None:
    """What ``asyppo plan`` says beside what the allocator saw."""
    from bench import planned  # it needs transformers

    planned.run()


def large() -> None:
    """The last rows of a chunk of more than 2^31 logits are right; raises AssertionError otherwise."""
    from asyppo_kernels import linear_logprob, linear_ppo_loss
    from asyppo_kernels.linear_logprob import linear_logprob_reference

    n, h, v, tail = 16_384, 64, 151_936, slice(-4, None)
    assert n * v > 2**31
    torch.manual_seed(0)
    hidden = torch.randn(n, h, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(v, h, device="cuda") / 4).bfloat16()
    target = torch.randint(v, (n,), device="cuda")
    exact = hidden.detach()[tail].double().requires_grad_()
    want = linear_logprob_reference(exact, weight.double(), target[tail])
    (gradient,) = torch.autograd.grad(want.logprob.sum(), exact)

    def near(got: Tensor, wanted: Tensor, tolerance: float) -> None:
        difference = (got.double() - wanted).abs().max() / wanted.abs().max()
        assert difference <= tolerance, float(difference)

    weights = torch.zeros(n, device="cuda")
    weights[tail] = 1.0
    ones = torch.ones(n, device="cuda")
    out = linear_ppo_loss(
        hidden,
        weight,
        target,
        linear_logprob(hidden.detach(), weight, target, entropy=False, backend="triton").logprob,
        ones,
        weights,
        compact=False,
        workspace_bytes=2**34,
        backend="triton",
    )
    near(out.logprob[tail], want.logprob.detach(), 1e-5)
    near(out.entropy[tail], want.entropy.detach(), 1e-5)  # type: ignore[union-attr]
    near(torch.autograd.grad(out.loss, hidden)[0][tail], -gradient, 2.0**-6)
    importlib.import_module("asyppo_kernels._policy_head").GPU_WORKSPACE_BYTES = 2**34
    both = linear_logprob(hidden, weight, target, backend="triton")
    near(both.logprob[tail], want.logprob.detach(), 1e-5)
    near(torch.autograd.grad(both.logprob.sum(), hidden)[0][tail], gradient, 2.0**-6)
    print(f"{n} x {v} logits in one chunk: right to the last row", flush=True)


def small() -> None:
    """Every kernel once, on shapes a sanitizer gets through."""
    for dtype in (torch.bfloat16, torch.float32):
        for logits_dtype in (torch.float32, torch.bfloat16):
            for v in (97, 10_007):
                policy_loss(5, 32, v, dtype, logits_dtype=logits_dtype, bias=True, softcap=20.0)()
                policy_loss(5, 32, v, dtype, logits_dtype=logits_dtype, compact=False)()
                logprob(5, 32, v, dtype, logits_dtype=logits_dtype)()
    ensemble(2, 3, 300, 64)()
    stacked(2, 37, 96, 80, (3, 1, 24))()
    torch.cuda.synchronize()


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def steps(left: Callable[[], float]) -> Sequence[tuple[str, Callable[[], list[str] | None]]]:
    """(name, command), the command made when its turn comes; None if it cannot run here."""
    here = _python("-m", "bench.gpu_check", "--step")

    def tests() -> list[str] | None:
        if not (importlib.util.find_spec("pytest") and importlib.util.find_spec("hypothesis")):
            return None
        workers = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        chosen = "(triton or policy_head_kernels) and not dtensor and not errors_name and not anything"
        return _python("-m", "pytest", "tests/ops", "-q", "-m", "not slow", "-k", chosen, *workers)

    def plan() -> list[str] | None:
        return [*here, "plan"] if importlib.util.find_spec("transformers") else None

    def sanitizer(tool: str) -> list[str] | None:
        found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        return [found, "--tool", tool, "--error-exitcode", "1", *here, "small"] if Path(found).exists() else None

    def bench() -> list[str]:
        minutes = max(0.5, (left() - AFTER_BENCH) / 60)
        ops = sorted(OPS, key=lambda op: (op in TRAINING) - (op in HEAD))  # float64 oracles of a whole update take long
        return _python("-m", "bench.run", "--no-sweeps", "--minutes", f"{minutes:.1f}", *(f"--op={op}" for op in ops))

    return [
        ("repeats", lambda: [*here, "repeats"]),
        ("tests", tests),
        ("bench", bench),
        ("plan", plan),
        ("capture", lambda: [*here, "capture"]),
        ("large", lambda: [*here, "large"]),
        ("small", lambda: [*here, "small"]),
        ("memcheck", lambda: sanitizer("memcheck")),
        ("racecheck", lambda: sanitizer("racecheck")),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run all steps, or one in this process."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__)
    parser.add_argument(
        "--step", choices=["repeats", "plan", "capture", "large", "small"], help="this one only, in this process"
    )
    parser.add_argument("--only", action="append", default=[], help="of the list, this step (may be repeated)")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU")
        return 1
    if chosen.step:
        {"repeats": repeats, "plan": plan, "capture": capture, "large": large, "small": small}[chosen.step]()
        return 0

    end = time.monotonic() + SECONDS
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {
        "PYTHONPATH": path,
        "ASYPPO_TEST_DEVICE": "cuda",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the tests ask torch for deterministic algorithms
    }
    environment.pop("TRITON_INTERPRET", None)
    outcome = {}
    for name, make in steps(lambda: end - time.monotonic()):
        if chosen.only and name not in chosen.only:
            continue
        command, limit = make(), min(LIMITS.get(name, SECONDS), end - time.monotonic())
        begin = time.monotonic()
        print(f"\n== {name}", flush=True)
        if command is None or limit < 5:
            outcome[name] = "cannot run here" if command is None else "no time left"
            continue
        try:
            status = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit).returncode
            outcome[name] = "passed" if status == 0 else f"FAILED ({status})"
        except subprocess.TimeoutExpired:
            outcome[name] = f"FAILED (not done after {limit:.0f} s)"
        except OSError as error:
            outcome[name] = f"FAILED ({error})"
        outcome[name] += f", {time.monotonic() - begin:.0f} s"
    print("\n" + "\n".join(f"{name:10} {what}" for name, what in outcome.items()))
    return 1 if any("FAILED" in what for what in outcome.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
