"""Reward functions, in TRL's signature: ``fn(prompts, completions, **columns) -> list[float | None]``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from asyppo.config import ConfigError
from asyppo.data import Row
from asyppo.distributed import divided

RewardFunc = Callable[..., "list[float | None]"]


class RewardError(RuntimeError):
    """A reward function returned something that is not one finite number, or None, for each sample."""


def extract_answer(completion: str) -> str:
    """Return what stands in the last ``<answer>…</answer>``, or else the whole completion without outer blanks."""
    from reasoning_gym.utils import extract_answer as extract

    answer = extract(completion)
    return completion.strip() if answer is None else answer


def reasoning_gym(prompts: list[str], completions: list[str], *, entry: list[dict], **_: Any) -> list[float | None]:
    """Return the task's own score, in [0, 1], of each extracted answer; ``entry`` is the task's own row."""
    from reasoning_gym import get_score_answer_fn

    return [
        float(get_score_answer_fn(row["metadata"]["source_dataset"])(extract_answer(completion), row))
        for completion, row in zip(completions, entry, strict=True)
    ]


def exact_match(prompts: list[str], completions: list[str], *, answer: list[str], **_: Any) -> list[float | None]:
    """Return 1 where the extracted answer is the column ``answer``, character for character, and 0 elsewhere."""
    return [float(extract_answer(c) == str(a)) for c, a in zip(completions, answer, strict=True)]


BUILT_IN: dict[str, RewardFunc] = {"reasoning_gym": reasoning_gym, "exact_match": exact_match}


def resolve_reward_funcs(funcs: Sequence[str | RewardFunc]) -> list[RewardFunc]:
    """Turn names of built-in reward functions into functions; a function stays itself. Raises ConfigError."""
    for func in funcs:
        if isinstance(func, str) and func not in BUILT_IN:
            raise ConfigError(f"reward_funcs: got {func!r}, needs one of {', '.join(BUILT_IN)}, or a function")
    return [BUILT_IN[func] if isinstance(func, str) else func for func in funcs]


def compute_rewards(funcs: Sequence[RewardFunc], rows: Sequence[Row], completions: Sequence[str]) -> list[list[float]]:
    """Return each function's rewards ``[function][sample]``; None ("not mine") counts as 0.

    Raises RewardError, which names the function and the sample, for a wrong length or a non-finite number. Each rank
    calls the functions on its own prompts.
    """

    def own(part: slice) -> list[tuple[float, ...]]:
        return list(zip(*_rewards(funcs, rows[part], completions[part]), strict=True))

    by_sample = divided(own, [id(row) for row in rows])
    return [list(of_function) for of_function in zip(*by_sample, strict=True)]


def _rewards(funcs: Sequence[RewardFunc], rows: Sequence[Row], completions: Sequence[str]) -> list[list[float]]:
    prompts = [row["prompt"] for row in rows]
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"} if rows else {}
    return [_checked(func, func(prompts=prompts, completions=list(completions), **columns), prompts) for func in funcs]


def _checked(func: RewardFunc, rewards: Sequence[float | None], prompts: Sequence[str]) -> list[float]:
    name = getattr(func, "__name__", repr(func))
    if len(rewards) != len(prompts):
        raise RewardError(f"reward function {name}: returned {len(rewards)} rewards, needs {len(prompts)}")
    for index, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise RewardError(
                f"reward function {name}: returned {reward} for sample {index} ({prompts[index]!r}), "
                "needs a finite number or None"
            )
    return [0.0 if reward is None else float(reward) for reward in rewards]
