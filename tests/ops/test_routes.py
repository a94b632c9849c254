"""An op's two ways, as a plain function and as a registered op: same bits, and each call takes the one it should."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from asyppo_kernels import (
    _registration,
    agreement_masks,
    ensemble_gae,
    ensemble_value,
    linear_logprob,
    linear_ppo_loss,
    stacked_embedding,
    stacked_qk_norm_rope,
    stacked_rms_norm,
    stacked_swiglu,
)
from asyppo_kernels._registration import Op


def forward(x: Tensor, y: Tensor | None, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """A small op: x² scale and x + y."""
    return x * x * scale, x.clone() if y is None else x + y


def backward(grad: Tensor, x: Tensor, scale: float) -> Tensor:
    return 2 * scale * grad * x


OP = Op("asyppo_tests::square", forward)
BACKWARD_OP = Op("asyppo_tests::square_backward", backward)


@OP.register_fake
def _(x: Tensor, y: Tensor | None, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@BACKWARD_OP.register_fake
def _(grad: Tensor, x: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, ctx.scale = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return BACKWARD_OP(grad, x, ctx.scale) + grad_sum, grad_sum if ctx.needs_input_grad[1] else None, None


OP.register_autograd(_backward, setup_context=_setup_context)

ROUTES = ["plain", "registered"]
routes = pytest.mark.parametrize("route", ROUTES)


@contextlib.contextmanager
def taking(route: str) -> Iterator[list[str]]:
    """Let every op take this way, whatever else holds; yields the names of the registered ops called."""
    called: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        if route == "registered":
            patch.setattr(_registration, "_somebody_looks", lambda: True)
        patch.setattr(torch.library.CustomOpDef, "__call__", spy(called))
        yield called


def spy(called: list[str]) -> Callable[..., Any]:
    real = torch.library.CustomOpDef.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(self._qualname)
        return real(self, *args, **kwargs)

    return call


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the registered ops that are called."""
    called: list[str] = []
    monkeypatch.setattr(torch.library.CustomOpDef, "__call__", spy(called))
    return called


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def rms_norm(residual: bool) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]]:
    def run(x: Tensor, weight: Tensor, more: Tensor | None = None) -> Sequence[Tensor]:
        return stacked_rms_norm(x, weight, residual=more, backend="triton")

    return run, [leaf(2, 5, 8), leaf(2, 8), *([leaf(2, 5, 8)] if residual else [])]


def qk_norm_rope(norm: bool) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]]:
    cos, sin = torch.rand(5, 6), torch.rand(5, 6)

    def run(q: Tensor, k: Tensor, *weights: Tensor) -> Sequence[Tensor]:
        named = dict(zip(("q_weight", "k_weight"), weights, strict=False))
        return stacked_qk_norm_rope(q, k, cos, sin, **named, backend="triton")

    return run, [leaf(2, 5, 3, 6), leaf(2, 5, 1, 6), *([leaf(2, 6), leaf(2, 6)] if norm else [])]


def embedding() -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]]:
    tokens, read = torch.randint(11, (2, 5)), torch.randn(2, 5, 2)

    def run(weight: Tensor, projection: Tensor) -> Sequence[Tensor]:
        return [stacked_embedding(tokens, weight, read, projection, padding_idx=3, backend="triton")]

    return run, [leaf(2, 11, 8), leaf(2, 2, 8)]


def value(backend: str) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]]:
    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
        return ensemble_value(hidden, weight, bias, backend=backend)

    return run, [leaf(3, 5, 8, dtype=torch.bfloat16), leaf(3, 8, dtype=torch.bfloat16), leaf(3)]


def logprob(backend: str) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]]:
    target = torch.tensor([3, 0, -100, 10])

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
        return linear_logprob(hidden, weight, target, bias=bias, softcap=5.0, backend=backend)

    return run, [leaf(4, 8), leaf(11, 8), leaf(11)]


def loss(backend: str) -> tuple[Callable[..., Sequence[Tensor]], list[Tensor]]:
    target, advantage = torch.tensor([3, 0, -100, 10]), torch.randn(4)
    old, token_weight = torch.full((4,), -2.4), torch.tensor([0.5, 0.25, 0.25, 0.0])

    def run(hidden: Tensor, weight: Tensor) -> Sequence[Tensor]:
        return linear_ppo_loss(hidden, weight, target, old, advantage, token_weight, entropy_coef=0.1, backend=backend)

    return run, [leaf(4, 8), leaf(11, 8)]


CASES: dict[str, Callable[[], tuple[Callable[..., Any], list[Tensor]]]] = {
    "toy": lambda: (lambda x, y: OP(x, y, 3.0), [leaf(4), leaf(4)]),
    "stacked_rms_norm": lambda: rms_norm(residual=False),
    "stacked_rms_norm, residual": lambda: rms_norm(residual=True),
    "stacked_qk_norm_rope": lambda: qk_norm_rope(norm=True),
    "stacked_qk_norm_rope, rotation alone": lambda: qk_norm_rope(norm=False),
    "stacked_swiglu": lambda: (
        lambda gate, up: [stacked_swiglu(gate, up, backend="triton")],
        [leaf(2, 5, 8), leaf(2, 5, 8)],
    ),
    "stacked_embedding": lambda: embedding(),
    "ensemble_value, torch": lambda: value("torch"),
    "ensemble_value, triton": lambda: value("triton"),
    "linear_logprob, torch": lambda: logprob("torch"),
    "linear_logprob, triton": lambda: logprob("triton"),
    "linear_ppo_loss, torch": lambda: loss("torch"),
    "linear_ppo_loss, triton": lambda: loss("triton"),
}
cases = pytest.mark.parametrize("case", CASES)


def differentiable(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [y for y in outputs if y.grad_fn is not None]  # an input that is handed through has none


@cases
def test_both_ways_give_the_same_bits(case: str) -> None:
    run, inputs = CASES[case]()
    results, ways = [], []
    for route in ROUTES:
        with taking(route) as called:
            torch.manual_seed(1)
            outputs = run(*inputs)
            attached = differentiable(outputs)
            assert attached
            grads = torch.autograd.grad(attached, inputs, [torch.randn_like(y) for y in attached])
            with torch.no_grad():
                alone = run(*inputs)
            assert not differentiable(alone)
            results.append([*outputs, *grads, *alone])
            ways.append(called)
    for plain, by_op in zip(*results, strict=True):
        assert torch.equal(plain, by_op)
    assert ways[0] == []
    # Forward, backward, forward without gradients; the loss has formed its gradients before, and scales each.
    assert len(ways[1]) == (2 + len(inputs) if "loss" in case else 3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", ["ensemble_gae", "agreement_masks"])
def test_both_ways_give_the_same_bits_where_nothing_has_a_gradient(op: str, backend: str) -> None:
    x, mask = torch.rand(3, 2, 7), torch.rand(2, 7) < 0.7
    results, ways = [], []
    for route in ROUTES:
        with taking(route) as called:
            if op == "ensemble_gae":
                results.append(ensemble_gae(x, x[0], mask, lam=0.9, backend=backend))
            else:
                results.append(agreement_masks(x[0], mask, backend=backend))
            ways.append(called)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert ways[0] == []
    assert ways[1]


@cases
@routes
def test_gradients_are_formed_for_those_that_need_one(case: str, route: str) -> None:
    run, inputs = CASES[case]()
    with taking(route):
        for i in range(len(inputs)):
            own = [x.detach().requires_grad_(j == i) for j, x in enumerate(inputs)]
            sum(y.sum() for y in differentiable(run(*own))).backward()
            assert [x.grad is not None for x in own] == [j == i for j in range(len(inputs))]


@cases
@routes
def test_a_second_derivative_is_refused(case: str, route: str) -> None:
    run, inputs = CASES[case]()
    with taking(route):
        loss = sum(y.square().sum() for y in differentiable(run(*inputs)))
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            sum(g.sum() for g in grads).backward()


@routes
def test_an_input_changed_before_the_backward_is_refused(route: str) -> None:
    x, weight = leaf(2, 5, 8), leaf(2, 8)
    with taking(route):
        up = x * 1
        out = stacked_swiglu(up, up, backend="triton")
        up.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        normed, summed = stacked_rms_norm(x, weight, residual=x, backend="triton")
        summed.mul_(2)  # an output that is kept
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            normed.sum().backward()


@routes
def test_what_is_saved_passes_the_hooks(route: str) -> None:
    x, weight = leaf(2, 5, 8), leaf(2, 8)
    packed: list[Tensor] = []

    def pack(y: Tensor) -> Tensor:
        packed.append(y)
        return y.detach().clone()

    with taking(route), torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        normed, _ = stacked_rms_norm(x, weight, backend="triton")
    assert sorted(y.numel() for y in packed) == [16, 80]
    normed.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_takes_the_plain_way(registered: list[str], reentrant: bool) -> None:
    run, inputs = CASES["stacked_rms_norm, residual"]()
    want = torch.autograd.grad(run(*inputs)[0].sum(), inputs)
    checkpoint(lambda *x: run(*x)[0], *inputs, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(x.grad, g) for x, g in zip(inputs, want, strict=True))
    assert registered == []


def test_selective_checkpointing_sees_the_op(registered: list[str]) -> None:
    run, inputs = CASES["toy"]()
    want = torch.autograd.grad(run(*inputs)[0].sum(), inputs[0])[0]
    saved = torch.ops.asyppo_tests.square.default
    again = checkpoint(
        lambda *x: run(*x)[0],
        *inputs,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts([saved]),
    )
    again.sum().backward()
    assert torch.equal(inputs[0].grad, want)
    assert registered.count("asyppo_tests::square") == 2  # the second finds what the first has saved


def test_autocast_takes_the_plain_way(registered: list[str]) -> None:
    run, inputs = CASES["ensemble_value, torch"]()
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        sum(y.sum() for y in differentiable(run(*inputs))).backward()
    assert registered == []


def test_inference_and_parameters_take_the_plain_way(registered: list[str]) -> None:
    x = torch.nn.Parameter(torch.randn(4))
    OP(x, None)[0].sum().backward()
    assert torch.equal(x.grad, 4 * x)
    with torch.inference_mode():
        assert OP(x * 1, None)[0].is_inference()
    assert registered == []


def test_a_default_device_takes_the_plain_way(registered: list[str]) -> None:
    x = torch.randn(4)
    with torch.device(x.device):
        OP(x, x)
        assert registered == []
        with Function():
            OP(x, x)
    assert registered == ["asyppo_tests::square"]


def test_arguments_by_name_and_defaults(registered: list[str]) -> None:
    x = leaf(4)
    for out in (OP(x, None), OP(x, y=None), OP(y=None, x=x, scale=2.0), OP(x, None, scale=2.0)):
        assert torch.equal(out[0], 2 * x * x)
        assert torch.equal(torch.autograd.grad(out[0].sum(), x)[0], 4 * x)
    assert registered == []


class Dispatch(TorchDispatchMode):
    """Writes down what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    """Writes down what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Dispatch, Function])
def test_a_mode_sees_the_op(mode: type) -> None:
    x = leaf(4)
    with mode() as active:
        OP(x, None)[0].sum().backward()
    assert any("asyppo_tests.square" in name for name in active.seen)


def test_a_counter_of_flops_sees_the_op() -> None:
    x = torch.randn(4)
    counted = FlopCounterMode(display=False, custom_mapping={torch.ops.asyppo_tests.square: lambda *_, **__: 7})
    with counted:
        OP(x, x)
    assert counted.get_total_flops() == 7


def test_fake_and_meta_tensors_take_the_registered_way(registered: list[str]) -> None:
    with FakeTensorMode() as mode:
        out, _ = OP(torch.randn(4, requires_grad=True), None)
        assert isinstance(out, torch._subclasses.FakeTensor)
    outside, _ = OP(mode.from_tensor(torch.randn(4)), None)
    assert isinstance(outside, torch._subclasses.FakeTensor)
    assert OP(torch.randn(4, device="meta"), None)[0].is_meta
    assert registered == ["asyppo_tests::square"] * 3


class Subclass(Tensor):
    """Does nothing of its own."""


def test_subclasses_take_the_registered_way(registered: list[str]) -> None:
    x = torch.randn(4)
    assert type(OP(x.as_subclass(Subclass), x)[0]) is Subclass
    assert type(OP(x, x.as_subclass(Subclass))[0]) is Subclass
    assert registered == ["asyppo_tests::square"] * 2


def test_lazy_negatives_take_the_registered_way(registered: list[str]) -> None:
    y = torch.randn(4, dtype=torch.complex64).conj().imag
    assert y.is_neg()
    assert torch.equal(OP(y, None)[0], 2 * y * y)
    assert registered == ["asyppo_tests::square"]


def test_transforms_take_the_registered_way(registered: list[str]) -> None:
    """Which refuses those it has no rule for, rather than compute without them."""
    x = torch.randn(4)
    assert torch.equal(torch.func.functionalize(lambda x: OP(x, None)[0])(x), 2 * x * x)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: OP(x, None)[0].sum())(x)
    y = torch.randn(2, 4)
    assert torch.equal(torch.func.vmap(lambda y: OP(y, None)[0])(y), 2 * y * y)
    assert registered == ["asyppo_tests::square"] * 3


def test_compiled_code_holds_the_registered_op(registered: list[str]) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(copy.deepcopy(graph))
        return graph

    x = leaf(4)
    compiled = torch.compile(lambda x: OP(x, None)[0] * 1, backend=keep, fullgraph=True)
    assert torch.equal(compiled(x), 2 * x * x)
    (graph,) = graphs
    assert torch.ops.asyppo_tests.square.default in [node.target for node in graph.graph.nodes]
    exported = torch.export.export(Module(), (x.detach(),))
    assert torch.ops.asyppo_tests.square.default in [node.target for node in exported.graph.nodes]


class Module(torch.nn.Module):
    """The op alone."""

    def forward(self, x: Tensor) -> Tensor:
        return OP(x, None)[0]


def test_a_tracer_records_the_registered_op() -> None:
    traced = torch.jit.trace(Module(), (torch.ones(4),))
    assert "asyppo_tests::square" in str(traced.graph)


def test_opcheck() -> None:
    torch.library.opcheck(OP.registered, (leaf(4), leaf(4), 3.0))
    torch.library.opcheck(BACKWARD_OP.registered, (torch.randn(4), torch.randn(4), 3.0))
