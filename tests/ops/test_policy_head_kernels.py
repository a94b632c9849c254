"""What the Triton forms of the policy head promise beyond right results: launches, 64-bit offsets, memory."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from asyppo_kernels import linear_logprob, linear_ppo_loss
from asyppo_kernels._args import INTERPRETED
from asyppo_kernels._policy_head import HeadOptions, even_size
from asyppo_kernels._policy_head_kernels import Workspace, launch_shape, padded
from asyppo_kernels.linear_logprob.kernels import gradient_kernel, statistics_kernel
from asyppo_kernels.linear_ppo_loss import triton_form
from asyppo_kernels.linear_ppo_loss.result import RowResults
from asyppo_kernels.linear_ppo_loss.rows import PPOOptions, RowInputs, live_and_dead, read_rows

Count = Callable[[Callable[[], object]], list]


def head(n: int, h: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = torch.randn(n, h).to(dtype), torch.randn(v, h).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(v, (n,))


@pytest.mark.parametrize("compact", [True, False])
def test_loss_launches_one_kernel_a_chunk(compact: bool, count_launches: Count, count_gemms: Count) -> None:
    """After one that reads the rows; and three matrix products; a chunk of rows that are not live has one of each."""
    n, v = 20, 37
    row = torch.ones(n)
    keep = torch.arange(n) < 12
    inputs = (*head(n, 4, v), -row, row, row.where(torch.arange(n) < 16, 0.0))
    out = []

    def run() -> None:
        workspace = 4 * padded(v) * 5  # five rows
        out.append(linear_ppo_loss(*inputs, advantage_keep=keep, compact=compact, workspace_bytes=workspace, **triton))

    triton = {"backend": "triton"}
    launches = count_launches(run)
    sizes = [(4,), (4,), (4,), (4,)] if compact else [(5,)] * 4  # 12 live rows in 3 chunks, 4 that only count
    assert launches == [("rows_kernel", (1,)), *(("loss_kernel", size) for size in sizes)]
    assert len(count_gemms(run)) == (3 * 3 + 1 if compact else 4 * 3)
    assert count_launches(lambda: out[0].loss.backward()) == []
    with torch.no_grad():
        assert len(count_launches(run)) == 1 + len(sizes)
        assert len(count_gemms(run)) == len(sizes)


class Operators(TorchDispatchMode):
    """What torch is asked for inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def row_inputs(n: int, dtype: torch.dtype, *, optional: bool) -> RowInputs:
    """Every combination of what masks a row, many times over; NaN and wild targets in what is not to be read."""
    at = torch.arange(n)
    w, target = torch.rand(n).masked_fill(at % 3 == 0, 0.0), torch.randint(99, (n,)).masked_fill(at % 5 == 0, -100)
    counted = (w != 0) & (target != -100)
    keep = at % 7 < 4 if optional else torch.ones(n, dtype=torch.bool)
    w[target == -100], target[w == 0] = torch.nan, 10**12

    def number(read: torch.Tensor) -> torch.Tensor:
        return torch.randn(n).masked_fill(at % 4 == 0, 0.0).where(read, torch.nan).to(dtype)

    old, u = (number(read) if optional else None for read in (counted, counted & keep))
    masks = (keep, at % 11 < 5) if optional else (None, None)
    return RowInputs(target, old, number(counted & keep), w.to(dtype), *masks, number(counted), u)


def row_results(n: int) -> RowResults:
    """Memory that nothing was written to."""
    return RowResults(*(torch.empty(n) for _ in range(4)), torch.ones(n, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize(("entropy_coef", "kl_coef"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
@pytest.mark.parametrize("compact", [True, False])
def test_rows_are_read_in_one_launch_as_the_torch_form_reads_them(
    dtype: torch.dtype,
    optional: bool,
    entropy_coef: float,
    kl_coef: float,
    compact: bool,
    count_launches: Count,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And torch gives memory and views of it, and brings two counts to the host."""
    n, block = 500, 128
    monkeypatch.setattr(triton_form, "ROWS_BLOCK", block)
    given = row_inputs(n, dtype, optional=optional)
    ppo = PPOOptions(0.2, 0.2, None, entropy_coef, kl_coef, kl_bias_correction=False)
    out, operators, results = [], Operators(), row_results(n)

    def run() -> None:
        out.append(triton_form.read_rows(given, ppo, results, compact=compact))

    assert count_launches(run) == [("rows_kernel", (1 if compact else 4,))]
    (got, compacted), want = out[0], read_rows(given, ppo)
    assert not any(x.any() for x in results)
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name
    assert (compacted is not None) == compact
    if compacted is not None:
        assert all(torch.equal(a, b) for a, b in zip(compacted, live_and_dead(want), strict=True))
    if INTERPRETED:  # which itself has tensors
        monkeypatch.setattr(triton_form, "rows_kernel", defaultdict(lambda: lambda *args, **kwargs: None))
    with operators:
        run()
    memory = {"new_empty", "empty", "view", "alias", "slice", "select", "unbind", "detach"}
    assert operators.names <= memory | {"_to_copy", "_local_scalar_dense"}


def test_no_rows_are_read() -> None:
    given = row_inputs(0, torch.float32, optional=True)
    ppo = PPOOptions(0.2, 0.2, None, 0.1, 0.1, kl_bias_correction=False)
    for compact in (True, False):
        rows, compacted = triton_form.read_rows(given, ppo, row_results(0), compact=compact)
        assert all(x is not None and len(x) == 0 for x in (*rows, *(compacted or ())))


def test_logprob_launches_one_kernel_a_chunk_and_one_a_slice(
    count_launches: Count, count_gemms: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one matrix product a chunk, three a slice."""
    n, v = 20, 300
    inputs = head(n, 4, v)
    for name in ("CPU_WORKSPACE_BYTES", "GPU_WORKSPACE_BYTES"):
        monkeypatch.setattr(importlib.import_module("asyppo_kernels._policy_head"), name, 4 * n * 128)
    out = []

    def forward() -> None:
        out.append(linear_logprob(*inputs, backend="triton"))

    assert count_launches(forward) == [("statistics_kernel", (size,)) for size in (7, 7, 6)]
    assert len(count_gemms(forward)) == 3
    loss = out[0].logprob.sum() + out[0].entropy.sum()
    assert count_launches(lambda: loss.backward(retain_graph=True)) == [("gradient_kernel", (n,))] * 3
    assert len(count_gemms(lambda: loss.backward())) == 3 * 3


@pytest.mark.skipif(not INTERPRETED, reason="reserves 9 GB that only the pages touched take")
def test_offsets_are_of_64_bits() -> None:
    """Program 2 starts at logit 2^31."""
    v, pitch = 100, 2**30
    z = torch.from_numpy(np.empty(2 * pitch + 128, dtype=np.float32))
    rows, logits = torch.arange(3), torch.randn(3, v)
    for r in range(3):
        z[r * pitch : r * pitch + v] = logits[r]
    target, bias = torch.tensor([3, 99, 50]), torch.zeros(v)
    logprob, entropy, row_max, log_sum = torch.empty(4, 3).unbind()
    numbers = {"SOFTCAP": False, "BLOCK": 64}
    statistics_kernel[(3,)](
        z, rows, target, bias, logprob, entropy, row_max, log_sum, 0, v, pitch, 1.0, 1.0, 1.0, **numbers
    )
    want = logits.log_softmax(1)
    torch.testing.assert_close(logprob, want.gather(1, target[:, None])[:, 0])
    grads = torch.ones(3), torch.zeros(3)
    stats = entropy, row_max, log_sum
    gradient_kernel[(3,)](
        z, z, rows, target, bias, *stats, *grads, 0, v, pitch, pitch, 1.0, 1.0, 1.0, OVERLAPS=False, **numbers
    )
    for r in range(3):
        one_hot = torch.nn.functional.one_hot(target[r], v)
        torch.testing.assert_close(z[r * pitch : r * pitch + v], one_hot - want[r].exp())


@pytest.mark.parametrize("v", [1, 15, 16, 100, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_gradient_overwrites_only_what_is_read(dtype: torch.dtype, logits_dtype: torch.dtype, v: int) -> None:
    """Walking the row backwards in blocks, bytes written for a block lie within its row and not below its own logits,
    unless the gradient has memory of its own."""
    workspace = Workspace(torch.empty(2, 3, dtype=dtype), HeadOptions(1.0, None, logits_dtype), 2, v, gradient=True)
    z, grad = workspace.buffer[:, :v], workspace.gradient_buffer[:, :v]
    assert z.stride(0) * z.element_size() % 16 == grad.stride(0) * grad.element_size() % 16 == 0
    assert z.data_ptr() % 16 == grad.data_ptr() % 16 == 0
    if grad.untyped_storage().data_ptr() != z.untyped_storage().data_ptr():
        return
    block, _ = launch_shape(v, softcap=False)
    for r in range(2):
        row_end = z[r].data_ptr() + workspace.pitch * z.element_size()
        for start in range(0, v, block):
            assert grad[r, start:].data_ptr() >= z[r, start:].data_ptr()
        assert grad[r].data_ptr() + workspace.pitch * grad.element_size() <= row_end
    assert workspace.overlaps == (z.element_size() != grad.element_size())


@pytest.mark.parametrize(("count", "limit"), [(0, 5), (1, 1), (8192, 4417), (4418, 4417), (130, 129), (1000, 300)])
def test_parts_are_few_and_even(count: int, limit: int) -> None:
    size = even_size(count, limit)
    assert 1 <= size <= limit
    assert -(-count // size) == -(-count // limit)
    if limit >= 2 * 128 and count:
        assert count - (-(-count // size) - 1) * size > size - 2 * 128  # the last is not a sliver


def test_default_chunk_keeps_products_full() -> None:
    head_module = importlib.import_module("asyppo_kernels._policy_head")
    limit = head_module.lines_per_block(151_936, torch.device("cuda"), bytes_per_element=4)
    assert even_size(8192, limit) == 4096
    cpu = torch.device("cpu")
    for v in (151_936, 50_257):
        assert head_module.lines_per_block(v, cpu) >= 256  # each chunk reads the whole weight
    assert 4 * 151_936 * head_module.lines_per_block(151_936, cpu) < 2**28
    assert 4 * 512 * head_module.lines_per_block(512, cpu, head_module.slice_bytes(cpu)) == 2**25


@pytest.mark.parametrize(("n", "v"), [(0, 5), (1, 5), (30, 101), (7, 4001)])
def test_tiles_of_a_cpu_cover_every_row_once(n: int, v: int) -> None:
    head_module = importlib.import_module("asyppo_kernels._policy_head")
    z = torch.empty(n, v, device="cpu")
    parts = list(head_module.tiles(z))
    assert [row for part in parts for row in range(n)[part]] == list(range(n))
    limit = max(4 * v, head_module.CPU_TILE_BYTES * torch.get_num_threads())
    assert all(z[part].numel() * 4 <= limit for part in parts)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_activation_checkpointing(backend: str) -> None:
    """Inside a recomputed region the ops do their work twice, with the same result."""
    row = torch.ones(9)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        out = linear_ppo_loss(hidden.tanh(), weight, target, -3 * row, row, row, entropy_coef=0.1, backend=backend)
        both = linear_logprob(hidden.tanh(), weight, target, backend=backend)
        return out.loss + both.logprob.sum() + both.entropy.square().sum()

    inputs = head(9, 4, 21)
    want = torch.autograd.grad(loss(*inputs), inputs[:2])
    got = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, *inputs, use_reentrant=False), inputs[:2])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_marked_unsafe_for_graph_capture() -> None:
    for name in ("linear_ppo_loss", "linear_logprob", "linear_logprob_backward"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.asyppo, name).default.tags


def test_triton_on_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("asyppo_kernels._args"), "INTERPRETED", False)
    inputs = [x.detach().cpu() for x in head(2, 3, 4)]
    with pytest.raises(ValueError, match="backend: got 'triton' for tensors on cpu, needs a GPU, or TRITON_INTERPRET"):
        linear_logprob(*inputs, backend="triton")


@pytest.mark.parametrize("softcap", [None, 15.0])
def test_a_token_that_is_alone_has_no_gradient(softcap: float | None) -> None:
    """Log-prob, entropy and their gradients are 0, not a rounding of the logit."""
    hidden, weight, target = head(50, 8, 1)
    logprob, entropy = linear_logprob(hidden, weight, target, temperature=0.7, softcap=softcap, backend="triton")
    (logprob.sum() + entropy.sum()).backward()
    row = torch.ones(50)
    options = {"temperature": 0.7, "softcap": softcap, "entropy_coef": 0.1, "backend": "triton"}
    out = linear_ppo_loss(hidden, weight, target, None, row, row, **options)
    out.loss.backward()
    for x in (logprob, entropy, out.logprob, out.entropy, hidden.grad, weight.grad):
        assert x is not None
        assert (x == 0).all()
