"""Moments in 8 bits: bitsandbytes' own steps, near those of float32; what is small stays whole; what does not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asyppo.config import ConfigError
from asyppo.models.optimizers import Optim, make_optimizer, new_state, optimizer_bytes_per_parameter

Make = Callable[..., Any]


def model() -> nn.Module:
    """Two layers of 4096 numbers or more, one of them no multiple of a block, and small ones."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 60), nn.Linear(60, 128, bias=False), nn.Linear(128, 5))


def optimizer_of(net: nn.Module, optim: Optim = "adamw_8bit") -> torch.optim.AdamW:
    """With a weight decay."""
    return make_optimizer(list(net.parameters()), optim, learning_rate=1e-3, weight_decay=0.1)


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    """On gradients of many sizes, which follow from ``number``."""
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator) * torch.randn(p.shape, generator=generator).exp()
    optimizer.step()


def moved(net: nn.Module) -> dict[str, Tensor]:
    """How far each weight is from where it was."""
    start = dict(model().named_parameters())
    return {name: (p - start[name]).detach() for name, p in net.named_parameters()}


def test_steps_are_bitsandbytes_own_and_near_those_of_float32() -> None:
    from bitsandbytes.optim import AdamW8bit

    ours, theirs, plain = model(), model(), model()
    optimizers = [
        optimizer_of(ours),
        AdamW8bit(theirs.parameters(), lr=1e-3, weight_decay=0.1),
        optimizer_of(plain, "adamw"),
    ]
    for number in range(10):
        for optimizer in optimizers:
            step(optimizer, number)
    got, their, want = moved(ours), moved(theirs), moved(plain)
    for name, p in ours.named_parameters():
        if p.numel() >= 4096:
            assert torch.equal(got[name], their[name]), name
            assert 1e-4 < (got[name] - want[name]).norm() / want[name].norm() < 0.04, name  # seen: 0.026
        else:
            assert torch.equal(got[name], want[name]), name


def test_bytes() -> None:
    net = nn.Linear(256, 64, bias=False)
    for optim in ("adamw", "adamw_8bit"):
        optimizer = optimizer_of(net, optim)  # type: ignore[arg-type]
        step(optimizer, 0)
        moments = [v for name, v in optimizer.state[net.weight].items() if name != "step"]
        counted = sum(v.numel() * v.element_size() for v in moments)
        assert counted == optimizer_bytes_per_parameter(optim) * net.weight.numel()  # type: ignore[arg-type]


def test_state_is_loaded_to_the_bit() -> None:
    net = model()
    optimizer = optimizer_of(net)
    step(optimizer, 0)
    other = copy.deepcopy(net)
    loaded = optimizer_of(other)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in (1, 2):
        step(optimizer, number)
        step(loaded, number)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_a_parameter_without_a_gradient_keeps_its_state() -> None:
    net = model()
    optimizer = optimizer_of(net)
    for p in net.parameters():
        optimizer.state[p] = new_state(optimizer, p)
    optimizer.step()
    assert all(float(own["step"]) == 0 for own in optimizer.state.values())
    assert not any(delta.any() for delta in moved(net).values())


@pytest.mark.parametrize(("critic", "of_critics"), [({}, torch.uint8), ({"optim": "adamw"}, torch.float32)])
def test_critics_take_the_policys_unless_they_have_their_own(
    tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch, critic: dict[str, Any], of_critics: Any
) -> None:
    monkeypatch.setattr("asyppo.models.optimizers.SMALLEST", 64)
    config = tiny_config(optim="adamw_8bit", critic=critic)
    trainer = tiny_trainer(config, lambda completions, **_: [float(len(c)) for c in completions])
    trainer.step(1)
    assert trainer.critic_optimizer is not None
    for optimizer, dtype in ((trainer.policy_optimizer, torch.uint8), (trainer.critic_optimizer.adamw, of_critics)):
        kinds = {own["exp_avg"].dtype for p, own in optimizer.state.items() if p.numel() >= 64}
        assert kinds == {dtype}


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"optim": "adamw_8bit"}, "optim: got 'adamw_8bit'"), ({"critic": {"optim": "adamw_8bit"}}, "critic.optim: got")],
)
def test_without_bitsandbytes(
    tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], named: str
) -> None:
    monkeypatch.setattr("asyppo.models.quantized.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{named}.*, needs bitsandbytes, .* 'asyppo\[bitsandbytes\]'"):
        tiny_trainer(tiny_config(**fields), lambda completions, **_: [0.0])
