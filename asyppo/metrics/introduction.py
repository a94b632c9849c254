"""What a run sets out with, in a few lines for whoever started it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any

from torch import Tensor

from asyppo.config import AsyPPOConfig, EnvironmentConfig
from asyppo.models.critics import Critics, LoraCritics, OneByOneCritics, SideCritics
from asyppo.models.policy import Policy


def introduction(
    config: AsyPPOConfig, policy: Policy, critics: Critics | None, train_rows: Sized, eval_rows: Sized
) -> list[str]:
    """Return lines that say which device, models and rows a run has."""
    lines = {"device": _device(policy), "policy": _policy(policy)}
    if critics is not None:
        read = f", reading {' and '.join(critics.policy_inputs)} of the policy" if critics.policy_inputs else ""
        lines["critics" if len(critics) > 1 else "critic"] = _critics(critics) + read
    held_out = f"{len(eval_rows):,} held out to evaluate on" if len(eval_rows) else "none held out"
    rows = f"{len(train_rows):,} of {name} to train on" if (name := _name(train_rows)) else f"{len(train_rows):,}"
    lines["prompts"] = f"{rows}, {held_out} (data.eval_size)"
    if config.environment.given:
        lines["environment"] = _environment(config.environment)
    passes = config.max_steps * config.prompts_per_step / len(train_rows)
    lines["training"] = (
        f"{config.max_steps:,} steps of {config.prompts_per_step:,} prompts with {config.num_generations:,} responses "
        f"each, {passes:.3g} passes over the prompts"
    )
    return _aligned(lines)


def introduction_of_evaluation(config: AsyPPOConfig, policy: Policy, rows: Sized) -> list[str]:
    """Return lines that say which device, model and rows an evaluation has."""
    count = config.eval.num_generations
    prompts = f"{len(rows):,} held out, with {count:,} response{'s' if count > 1 else ''} each"
    return _aligned({"device": _device(policy), "model": _policy(policy), "prompts": prompts})


def _aligned(lines: Mapping[str, str]) -> list[str]:
    return [f"{name + ':':<12}{text}" for name, text in lines.items()]


def _device(policy: Policy) -> str:
    return f"{policy.device}, computing in {str(policy.dtype).removeprefix('torch.')}"


def _policy(policy: Policy) -> str:
    parameters = list(policy.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    size = f"{_size(parameters)} parameters"
    if len(trained) < len(parameters):
        size += f", {_size(trained)} of them trained"
    return f"{_called(policy.model.config)}, {size}"


def _critics(critics: Critics) -> str:
    count, called = len(critics), _called(critics.config)
    parameters = list(critics.parameters())
    if isinstance(critics, LoraCritics):
        frozen, own = (_size(p for p in parameters if p.requires_grad is trained) for trained in (False, True))
        return f"{count} × adapters of rank {critics.r} over {called}, {own} parameters in all over its {frozen}"
    if isinstance(critics, SideCritics):
        shape = critics.shape
        layers = f"layer{'s' * (len(shape.layers) > 1)} {' and '.join(map(str, shape.layers))}"
        called = f"{shape.network} of width {shape.width} on hidden states of the policy's {layers}"
    how = "one after another" if isinstance(critics, OneByOneCritics) else "together"
    return f"{count} × {called}, {_size(parameters, count)} parameters each" + (
        f", computed {how}" if count > 1 else ""
    )


def _environment(settings: EnvironmentConfig) -> str:
    params = ", ".join(f"{name} {value}" for name, value in settings.params.items())
    named = [settings.name + (f" with {params}" if params else "")] if settings.name is not None else []
    return f"{', '.join([*named, *settings.tools])}, at most {settings.max_turns} turns"


def _called(config: Any) -> str:
    return config._name_or_path or config.model_type


def _name(rows: Any) -> str:
    return getattr(rows, "name", "")


def _size(parameters: Iterable[Tensor], parts: int = 1) -> str:
    count = sum(p.numel() for p in parameters) / parts
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,.0f}"
