"""Reward functions, in TRL's signature: ``fn(prompts, completions, **columns) -> list[float | None]``.

A function gets keyword arguments, each a list with one item a sample: ``prompts`` and ``completions``, every other
column of the data, and ``completion_ids``, the tokens of each response. As in TRL, a completion is text where the
prompt is text, and ``[{"role": "assistant", "content": …}]`` where the prompt is chat messages. Without ``**columns``
it gets what it names. It may be a coroutine function.

It returns one reward for each sample: a number; None for "not mine", which counts in no sum and no mean; or, to reward
tokens, a list with one number for each of the sample's ``completion_ids``.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asyppo.config import ConfigError
from asyppo.config.references import resolve
from asyppo.data.prompts import Row, prompt_text
from asyppo.distributed.processes import divided
from asyppo.rewards.built_in import BUILT_IN, Reward, RewardFunc
from asyppo.rewards.worker import (
    Failure,
    RewardProcess,
    TimedOut,
    call,
    name_of,
    reference_of,
    run_coroutine,
)

log = logging.getLogger("asyppo")

Arguments = dict[str, list[Any]]


class RewardError(RuntimeError):
    """A reward function failed, or returned what is no reward. The message names function, step and sample."""

    exit_status = 2


class RewardFunction:
    """A reward function with its name in metrics and messages, and the seconds it may take for one sample."""

    def __init__(self, func: RewardFunc, name: str, timeout: float | None = None):
        self.func, self.name, self.timeout = func, name, timeout
        self.awaited = inspect.iscoroutinefunction(func)
        self.parameters = inspect.signature(func).parameters
        self.process = None if timeout is None or self.awaited else RewardProcess(reference_of(func))

    def takes(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of ``arguments`` that the function has parameters for."""
        if any(p.kind is p.VAR_KEYWORD for p in self.parameters.values()):
            return dict(arguments)
        return {name: value for name, value in arguments.items() if name in self.parameters}

    def check_columns(self, row: Row) -> None:
        """Raise ConfigError if the function needs a column that ``row`` has not."""
        there = [name for name in row if name != "prompt"]
        for name, parameter in self.parameters.items():
            needed = parameter.default is parameter.empty and parameter.kind not in (
                parameter.VAR_KEYWORD,
                parameter.VAR_POSITIONAL,
            )
            if needed and name not in ("prompts", "completions", "completion_ids", *there):
                raise ConfigError(
                    f"reward_funcs: {self.name} needs a column {name!r}, but the data has {', '.join(there) or 'none'}"
                )

    def __call__(self, arguments: Arguments) -> tuple[Any, list[int]]:
        """Return what the function returns, and the samples it was cut off at, whose reward is None.

        Without a time limit it is called once, for all samples. With one it is called for one sample at a time, in a
        process that is ended when the time is over; a coroutine function, which can be cut off where it is, is called
        for all of them side by side. Raises ``_SampleFailure``.
        """
        arguments = self.takes(arguments)
        count = len(arguments["completions"]) if "completions" in arguments else len(next(iter(arguments.values())))
        if self.timeout is None:
            return self._at_once(arguments, count), []
        if self.process is None:
            outcomes = run_coroutine(self._side_by_side([_sample(arguments, i) for i in range(count)]))
        else:
            outcomes = [self._cut_off(_sample(arguments, i)) for i in range(count)]
        rewards: list[Any] = []
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, (TimedOut, TimeoutError)):
                rewards.append(None)
            elif isinstance(outcome, BaseException):
                failure = outcome if isinstance(outcome, Failure) else Failure.of(self.func, outcome)
                raise _SampleFailure(str(failure), i) from outcome
            elif not isinstance(outcome, list) or len(outcome) != 1:
                raise _SampleFailure(f"returned {outcome!r} for one sample, needs a list with one reward", i)
            else:
                rewards.append(outcome[0])
        return rewards, [i for i, outcome in enumerate(outcomes) if isinstance(outcome, (TimedOut, TimeoutError))]

    def _at_once(self, arguments: Arguments, count: int) -> Any:
        try:
            return call(self.func, arguments)
        except ConfigError:
            raise
        except Exception as error:
            # Which sample it is about shows when each is tried alone; it may be none, and then the batch is named.
            for i in range(count):
                try:
                    call(self.func, _sample(arguments, i))
                except Exception as own:
                    raise _SampleFailure(str(Failure.of(self.func, own)), i) from own
            raise _SampleFailure(str(Failure.of(self.func, error)), None) from error

    def _cut_off(self, sample: Arguments) -> Any:
        assert self.process is not None
        assert self.timeout is not None
        try:
            return self.process(sample, self.timeout)
        except (TimedOut, Failure) as outcome:
            return outcome

    async def _side_by_side(self, samples: list[Arguments]) -> list[Any]:
        func: Any = self.func
        return await asyncio.gather(
            *(asyncio.wait_for(func(**sample), self.timeout) for sample in samples), return_exceptions=True
        )


class _SampleFailure(Exception):
    """A reward function failed at a sample, or at no one in particular (None)."""

    def __init__(self, message: str, sample: int | None):
        super().__init__(message)
        self.sample = sample


def _sample(arguments: Arguments, i: int) -> Arguments:
    return {name: [values[i]] for name, values in arguments.items()}


def resolve_reward_funcs(
    funcs: Sequence[str | RewardFunc | RewardFunction],
    timeout: float | None = None,
    weights: Sequence[float] | None = None,
) -> list[RewardFunction]:
    """Turn names (built in, ``module:function``, ``path.py:function``) and functions into reward functions.

    One name may come twice; later ones get a number behind it. Raises ConfigError, also where ``weights`` do not fit.
    """
    resolved: list[RewardFunction] = []
    for func in funcs:
        if isinstance(func, RewardFunction):
            resolved.append(func)
            continue
        if isinstance(func, str):
            func = resolve("reward_funcs", func, BUILT_IN)
        name, taken = name_of(func), [other.name for other in resolved]
        count = sum(other.partition("#")[0] == name for other in taken)
        resolved.append(RewardFunction(func, f"{name}#{count + 1}" if count else name, timeout))
    if weights is not None and len(weights) != len(funcs):
        raise ConfigError(
            f"reward_weights: got {list(weights)}, needs {len(funcs)}, one for each of the reward functions"
        )
    return resolved


@dataclass(frozen=True)
class Rewards:
    """Rewards of B samples."""

    by_function: dict[str, list[float | None]]
    """Each function's rewards, unweighted; of rewards of tokens, their sum."""
    total: list[float | Tensor]
    """Weighted sum over functions: a number, which belongs to the last token of the response, or where a function
    rewarded tokens, float32 [tokens]."""
    timeouts: dict[str, int]
    """At how many samples each function was cut off; empty without a time limit."""

    @property
    def by_sample(self) -> list[dict[str, float | None]]:
        """Return ``by_function`` the other way round: each sample's rewards by function."""
        return [
            dict(zip(self.by_function, sample_rewards, strict=True))
            for sample_rewards in zip(*self.by_function.values(), strict=True)
        ]

    @property
    def scores(self) -> list[float]:
        """Return the weighted sum over functions and tokens of each sample."""
        return [float(t.sum()) if isinstance(t, Tensor) else t for t in self.total]


def compute_rewards(
    funcs: Sequence[RewardFunc | RewardFunction],
    rows: Sequence[Row],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    weights: Sequence[float] | None = None,
    step: int | None = None,
) -> Rewards:
    """Return the rewards of each row's completion. ``step`` is for messages; None: it is an evaluation. Each rank calls
    the functions on its own prompts.

    Raises RewardError for a function that raises, and for a wrong number of rewards, a reward that is no finite number,
    or a wrong number of rewards of tokens. A sample that no function has a reward for gets 0, with a warning.
    """
    functions = resolve_reward_funcs(funcs)

    def own(part: slice) -> list[Rewards]:
        first = part.start
        return [_rewards(functions, rows[part], completions[part], completion_ids[part], weights, step, first)]

    parts = divided(own, [id(row) for row in rows])
    return Rewards(
        {name: [reward for part in parts for reward in part.by_function[name]] for name in parts[0].by_function},
        [total for part in parts for total in part.total],
        {name: sum(part.timeouts[name] for part in parts) for name in parts[0].timeouts},
    )


def _rewards(
    funcs: Sequence[RewardFunction],
    rows: Sequence[Row],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    weights: Sequence[float] | None,
    step: int | None,
    first: int,
) -> Rewards:
    """Rewards of a part of the samples, the first of which is number ``first``."""
    columns = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    arguments: Arguments = {name: [row.get(name) for row in rows] for name in columns} | {
        "prompts": [row["prompt"] for row in rows],
        "completions": [
            completion if isinstance(row["prompt"], str) else [{"role": "assistant", "content": completion}]
            for row, completion in zip(rows, completions, strict=True)
        ],
        "completion_ids": [list(ids) for ids in completion_ids],
    }
    when = "evaluation" if step is None else f"step {step}"
    by_function: dict[str, list[Reward]] = {}
    timeouts: dict[str, int] = {}
    for func in funcs:

        def fail(what: str, sample: int | None, func: RewardFunction = func) -> RewardError:
            at = "" if sample is None else f", sample {first + sample} ({_beginning(rows[sample])})"
            return RewardError(f"reward function {func.name}, {when}{at}: {what}")

        try:
            rewards, cut_off = func(arguments)
        except _SampleFailure as failure:
            raise fail(str(failure), failure.sample) from failure.__cause__
        if not isinstance(rewards, list):
            raise fail(f"returned {rewards!r}, needs a list with one reward for each of {len(rows)} samples", None)
        if len(rewards) != len(rows):
            raise fail(f"returned {len(rewards)} rewards, needs {len(rows)}, one for each sample", None)
        for i, reward in enumerate(rewards):
            fault = _fault(reward, len(completion_ids[i]))
            if fault is not None:
                raise fail(fault, i)
        by_function[func.name] = rewards
        if func.timeout is not None:
            timeouts[func.name] = len(cut_off)
        if cut_off:
            log.warning(
                "reward function %s, %s: cut off after %g s at %d of %d samples, the first is sample %d (%s)",
                *(
                    func.name,
                    when,
                    func.timeout,
                    len(cut_off),
                    len(rows),
                    first + cut_off[0],
                    _beginning(rows[cut_off[0]]),
                ),
            )
    nobodys = [i for i in range(len(rows)) if all(rewards[i] is None for rewards in by_function.values())]
    if nobodys:
        log.warning(
            "%s: no reward function has a reward for %d of %d samples, which count as 0; the first is sample %d (%s)",
            *(when, len(nobodys), len(rows), first + nobodys[0], _beginning(rows[nobodys[0]])),
        )
    weights = [1.0] * len(funcs) if weights is None else weights
    return Rewards(
        {name: [_sum(reward) for reward in rewards] for name, rewards in by_function.items()},
        [_total(sample_rewards, weights) for sample_rewards in zip(*by_function.values(), strict=True)],
        timeouts,
    )


def _beginning(row: Row) -> str:
    text = prompt_text(row["prompt"])
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _fault(reward: Any, tokens: int) -> str | None:
    """Say why ``reward`` is none for a response of so many tokens, or None."""
    if isinstance(reward, list):
        if len(reward) != tokens:
            return f"returned rewards for {len(reward)} tokens, needs {tokens}, one for each token of the response"
        if not all(_is_finite(token_reward) for token_reward in reward):
            return f"returned {next(r for r in reward if not _is_finite(r))!r} for a token, needs finite numbers"
    elif reward is not None and not _is_finite(reward):
        return f"returned {reward!r}, needs a finite number or None"
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _sum(reward: Reward) -> float | None:
    return float(sum(reward)) if isinstance(reward, list) else reward if reward is None else float(reward)


def _total(sample_rewards: Sequence[Reward], weights: Sequence[float]) -> float | Tensor:
    """Weighted sum over functions; a number beside rewards of tokens goes to the last token."""
    total = 0.0
    tokens: Tensor | None = None
    for reward, weight in zip(sample_rewards, weights, strict=True):
        if isinstance(reward, list):
            weighted = weight * torch.tensor(reward, dtype=torch.float32)
            tokens = weighted if tokens is None else tokens + weighted
        elif reward is not None:
            total += weight * reward
    if tokens is None:
        return total
    tokens[-1] += total
    return tokens
