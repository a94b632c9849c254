"""Reward functions, in TRL's signature: ``fn(prompts, completions, **columns) -> list[float | None]``.

A function gets keyword arguments, each a list with one item a sample: ``prompts`` and ``completions``, every other
column of the data, and ``completion_ids``, the tokens of each response. As in TRL, a completion is text where the
prompt is text, and ``[{"role": "assistant", "content": …}]`` where the prompt is chat messages. It also gets
``trainer_state``, transformers' ``TrainerState`` (``global_step`` counts the steps that are done), with an environment
``environments``, the objects that the episodes were played with, and
``log_metric(name, value)``, whose mean over the step is reported, and ``log_extra(column, values)``, which writes one
value a sample to ``samples.jsonl``. Without ``**columns`` it gets what it names. It may be a coroutine function.

It returns one reward for each sample: a number; None for "not mine", which counts in no sum and no mean; or, to reward
tokens, a list with one number for each of the sample's ``completion_ids``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from asyppo.data.prompts import prompt_text
from asyppo.data.rows import Row
from asyppo.distributed.processes import divided
from asyppo.rewards.built_in import Reward, RewardFunc
from asyppo.rewards.function import Arguments, RewardFunction, SampleFailure, resolve_reward_funcs
from asyppo.rewards.logged import Logged

log = logging.getLogger("asyppo")

LARGEST = torch.finfo(torch.float32).max


class RewardError(RuntimeError):
    """A reward function failed, or returned what is no reward. The message names function, step and sample."""

    exit_status = 2


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
    logged: Logged = field(default_factory=Logged)
    """What the functions logged: values of metrics, and columns with one value a sample."""

    @property
    def by_sample(self) -> list[dict[str, float | None]]:
        """Return ``by_function`` the other way round: each sample's rewards by function."""
        return [
            dict(zip(self.by_function, sample_rewards, strict=True))
            for sample_rewards in zip(*self.by_function.values(), strict=True)
        ]

    @property
    def extra_by_sample(self) -> list[dict[str, Any]]:
        """Return each sample's values of the columns that functions logged."""
        columns = self.logged.extra
        return [{name: values[i] for name, values in columns.items()} for i in range(len(self.total))]

    @property
    def scores(self) -> list[float]:
        """Return the weighted sum over functions and tokens of each sample."""
        return [float(t.sum()) if isinstance(t, Tensor) else t for t in self.total]


def compute_rewards(
    funcs: Sequence[RewardFunc | RewardFunction],
    rows: Sequence[Row],
    completions: Sequence[str | list[dict[str, Any]]],
    completion_ids: Sequence[Sequence[int]],
    *,
    weights: Sequence[float] | None = None,
    step: int | None = None,
    trainer_state: TrainerState | None = None,
    environments: Sequence[Any] | None = None,
) -> Rewards:
    """Return the rewards of each row's completion. ``step`` is for messages; None: it is an evaluation. Functions see
    ``trainer_state`` (None: of before the first step), and ``environments``, one a completion. Each rank calls the
    functions on its own prompts. A completion is text, or chat messages.

    Raises RewardError for a function that raises, and for a wrong number of rewards, a reward that is no finite number,
    or a wrong number of rewards of tokens. A sample that no function has a reward for gets 0, with a warning.
    """
    functions = resolve_reward_funcs(list(funcs))
    trainer_state = TrainerState() if trainer_state is None else trainer_state

    def own(part: slice) -> list[Rewards]:
        first = part.start
        given = rows[part], completions[part], completion_ids[part]
        shared = None if environments is None else environments[part]
        return [_rewards(functions, *given, weights, step, trainer_state, first, shared)]

    parts = divided(own, [row["prompt"] for row in rows])  # rows of a group need not be one object
    return Rewards(
        {name: [reward for part in parts for reward in part.by_function[name]] for name in parts[0].by_function},
        [total for part in parts for total in part.total],
        {name: sum(part.timeouts[name] for part in parts) for name in parts[0].timeouts},
        _joined(parts),
    )


def _joined(parts: Sequence[Rewards]) -> Logged:
    """What was logged of all parts; a column that was not logged in one is None there."""
    logged = Logged()
    for part in parts:
        for name, values in part.logged.metrics.items():
            logged.metrics.setdefault(name, []).extend(values)
    for column in dict.fromkeys(name for part in parts for name in part.logged.extra):
        logged.extra[column] = [v for p in parts for v in p.logged.extra.get(column, [None] * len(p.total))]
    return logged


def _rewards(
    funcs: Sequence[RewardFunction],
    rows: Sequence[Row],
    completions: Sequence[str | list[dict[str, Any]]],
    completion_ids: Sequence[Sequence[int]],
    weights: Sequence[float] | None,
    step: int | None,
    trainer_state: TrainerState,
    first: int,
    environments: Sequence[Any] | None,
) -> Rewards:
    """Rewards of a part of the samples, the first of which is number ``first``."""
    columns = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    arguments: Arguments = {name: [row.get(name) for row in rows] for name in columns} | {
        "prompts": [row["prompt"] for row in rows],
        "completions": [
            completion
            if isinstance(row["prompt"], str) or not isinstance(completion, str)
            else [{"role": "assistant", "content": completion}]
            for row, completion in zip(rows, completions, strict=True)
        ],
        "completion_ids": [list(ids) for ids in completion_ids],
    }
    if environments is not None:
        arguments["environments"] = list(environments)
    when = "evaluation" if step is None else f"step {step}"
    by_function: dict[str, list[Reward]] = {}
    timeouts: dict[str, int] = {}
    logged = Logged()
    for func in funcs:

        def fail(what: str, sample: int | None, func: RewardFunction = func) -> RewardError:
            at = "" if sample is None else f", sample {first + sample} ({_beginning(rows[sample])})"
            return RewardError(f"reward function {func.name}, {when}{at}: {what}")

        try:
            rewards, cut_off = func(arguments, trainer_state, logged)
        except SampleFailure as failure:
            raise fail(str(failure), failure.sample) from failure.__cause__
        if not isinstance(rewards, list):
            raise fail(f"returned {rewards!r}, needs a list with one reward for each of {len(rows)} samples", None)
        if len(rewards) != len(rows):
            raise fail(f"returned {len(rewards)} rewards, needs {len(rows)}, one for each sample", None)
        for i, reward in enumerate(rewards):
            fault = _fault(reward, len(completion_ids[i]))
            if fault is not None:
                raise fail(fault, i)
        if (fault := logged.fault(len(rows))) is not None:
            raise fail(fault, None)
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
        logged,
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
    return isinstance(value, (int, float)) and abs(value) <= LARGEST


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
