"""A reward function: what it is called with, how, and what cuts it off."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import TrainerState

from asyppo.config import ConfigError
from asyppo.config.references import resolve
from asyppo.data.checks import Need
from asyppo.data.rows import short
from asyppo.rewards.built_in import BUILT_IN, READS, RewardFunc
from asyppo.rewards.logged import Logged
from asyppo.rewards.model import RewardModel, is_model_name
from asyppo.rewards.worker import (
    Failure,
    RewardProcess,
    TimedOut,
    call,
    name_of,
    reference_of,
    run_coroutine,
)

Arguments = dict[str, list[Any]]

LOGS = ("log_extra", "log_metric")
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "environments", *LOGS)
"""What a function is given besides the columns of the data."""


class RewardFunction:
    """A reward function with its name in metrics and messages, and the seconds it may take for one sample."""

    def __init__(self, func: RewardFunc, name: str, timeout: float | None = None):
        self.func, self.name = func, name
        self.timeout = None if isinstance(func, RewardModel) else timeout
        self.awaited = inspect.iscoroutinefunction(func)
        self.parameters = inspect.signature(func).parameters
        self.process = None if self.timeout is None or self.awaited else RewardProcess(reference_of(func))

    def takes(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of ``arguments`` that the function has parameters for."""
        if any(p.kind is p.VAR_KEYWORD for p in self.parameters.values()):
            return dict(arguments)
        return {name: value for name, value in arguments.items() if name in self.parameters}

    @property
    def need(self) -> Need:
        """What it reads of a row. A built-in function is content with a column that has no value in a row."""
        if (columns := READS.get(self.func)) is not None:
            return Need(self.name, (), columns)
        without_default = [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]
        return Need(self.name, tuple(name for name in without_default if name not in GIVEN))

    def to(self, device: torch.device) -> None:
        """Put a reward model on ``device``."""
        if isinstance(self.func, RewardModel):
            self.func.model.to(device)

    def __call__(self, arguments: Arguments, trainer_state: TrainerState, logged: Logged) -> tuple[Any, list[int]]:
        """Return what the function returns, and the samples it was cut off at, whose reward is None.

        Without a time limit it is called once, for all samples. With one it is called for one sample at a time, in a
        process that is ended when the time is over; a coroutine function, which can be cut off where it is, is called
        for all of them side by side. ``logged`` gets what it logs. Raises ``SampleFailure``.
        """
        count = len(next(iter(arguments.values())))
        if self.process is not None:  # an environment stays where it is
            arguments = {name: values for name, values in arguments.items() if name != "environments"}
        arguments = self.takes(arguments)
        if self.timeout is None:
            return self._at_once(arguments, count, trainer_state, logged), []
        if self.process is None:
            outcomes = run_coroutine(self._side_by_side(arguments, count, trainer_state, logged))
        else:
            outcomes = self._one_by_one(arguments, count, trainer_state, logged)
        rewards: list[Any] = []
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, (TimedOut, TimeoutError)):
                rewards.append(None)
            elif isinstance(outcome, BaseException):
                failure = outcome if isinstance(outcome, Failure) else Failure.of(self.func, outcome)
                raise SampleFailure(str(failure), i) from outcome
            elif not isinstance(outcome, list) or len(outcome) != 1:
                raise SampleFailure(f"returned {outcome!r} for one sample, needs a list with one reward", i)
            else:
                rewards.append(outcome[0])
        return rewards, [i for i, outcome in enumerate(outcomes) if isinstance(outcome, (TimedOut, TimeoutError))]

    def _shared(self, trainer_state: TrainerState, logged: Logged) -> dict[str, Any]:
        """What it takes that is not of single samples."""
        return self.takes({"trainer_state": trainer_state} | {name: getattr(logged, name) for name in LOGS})

    def _at_once(self, arguments: Arguments, count: int, trainer_state: TrainerState, logged: Logged) -> Any:
        try:
            return call(self.func, arguments | self._shared(trainer_state, logged))
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:  # exit() in code that it executes, too
            # Which sample it is about shows when each is tried alone; it may be none, and then the batch is named.
            for i in range(count):
                try:
                    call(self.func, _sample(arguments, i) | self._shared(trainer_state, Logged()))
                except (Exception, SystemExit) as own:
                    raise SampleFailure(str(Failure.of(self.func, own)), i) from own
            raise SampleFailure(str(Failure.of(self.func, error)), None) from error

    def _one_by_one(self, arguments: Arguments, count: int, trainer_state: TrainerState, logged: Logged) -> list[Any]:
        assert self.process is not None
        assert self.timeout is not None
        # As plain values, which the other process needs no transformers for; they do not grow with the steps.
        known = {name: value for name, value in vars(trainer_state).items() if name != "stateful_callbacks"}
        known["log_history"] = known["log_history"][-1:]
        shared = self.takes({"trainer_state": SimpleNamespace(**known)})
        logs = list(self.takes(dict.fromkeys(LOGS)))
        outcomes: list[Any] = []
        own = [Logged() for _ in range(count)]
        for i in range(count):
            try:
                outcome, own[i] = self.process(_sample(arguments, i) | shared, self.timeout, logs)
                outcomes.append(outcome)
            except (TimedOut, Failure) as outcome:
                outcomes.append(outcome)
        logged.add(own)
        return outcomes

    async def _side_by_side(
        self, arguments: Arguments, count: int, trainer_state: TrainerState, logged: Logged
    ) -> list[Any]:
        func: Any = self.func
        own = [Logged() for _ in range(count)]
        calls = (func(**_sample(arguments, i) | self._shared(trainer_state, own[i])) for i in range(count))
        outcomes = await asyncio.gather(*(asyncio.wait_for(one, self.timeout) for one in calls), return_exceptions=True)
        logged.add(own)
        return outcomes


class SampleFailure(Exception):
    """A reward function failed at a sample, or at no one in particular (None)."""

    def __init__(self, message: str, sample: int | None):
        super().__init__(message)
        self.sample = sample


def _sample(arguments: Arguments, i: int) -> Arguments:
    return {name: [values[i]] for name, values in arguments.items()}


RewardFuncs = str | RewardFunc | RewardFunction | nn.Module | Sequence[str | RewardFunc | RewardFunction | nn.Module]
"""One function, or several."""


def resolve_reward_funcs(
    funcs: RewardFuncs,
    timeout: float | None = None,
    weights: Sequence[float] | None = None,
    processing_classes: Any = None,
) -> list[RewardFunction]:
    """Turn names (built in, ``module:function``, ``path.py:function``, a directory or hub name of a sequence
    classifier), functions and sequence classifiers into reward functions.

    ``processing_classes`` are tokenizers of the classifiers, one for each of ``funcs``, or None where it lies beside
    the weights. One name may come twice; later ones get a number behind it. A time limit is not for classifiers. Raises
    ConfigError, also where ``weights`` or ``processing_classes`` do not fit.
    """
    several = isinstance(funcs, Sequence) and not isinstance(funcs, str)
    listed: Sequence[Any] = funcs if several else [funcs]  # type: ignore[assignment]
    if not isinstance(processing_classes, Sequence):
        processing_classes = [processing_classes] * (1 if processing_classes is not None else len(listed))
    if len(processing_classes) != len(listed):
        raise ConfigError(
            f"reward_processing_classes: got {len(processing_classes)}, needs {len(listed)}, one for each of the "
            "reward functions"
        )
    resolved: list[RewardFunction] = []
    for func, tokenizer in zip(listed, processing_classes, strict=True):
        if isinstance(func, RewardFunction):
            resolved.append(func)
            continue
        func = _function(func, tokenizer)
        name, taken = name_of(func), [other.name for other in resolved]
        count = sum(other.partition("#")[0] == name for other in taken)
        resolved.append(RewardFunction(func, f"{name}#{count + 1}" if count else name, timeout))
    if weights is not None and len(weights) != len(listed):
        raise ConfigError(
            f"reward_weights: got {list(weights)}, needs {len(listed)}, one for each of the reward functions"
        )
    return resolved


def _function(func: Any, tokenizer: Any) -> RewardFunc:
    if isinstance(func, nn.Module):
        return RewardModel(func, tokenizer)
    if isinstance(func, str):
        if func not in BUILT_IN and ":" not in func and is_model_name(func):
            return RewardModel.from_pretrained(func, tokenizer)
        return resolve("reward_funcs", func, BUILT_IN)
    if not callable(func):
        raise ConfigError(f"reward_funcs: got {short(func)}, needs a function, a name, or a sequence classifier")
    return func
