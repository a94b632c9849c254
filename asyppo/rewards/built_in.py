"""The built-in reward functions.

They import what they need when they are called: every process that runs one under a time limit imports this file.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

Reward = float | None | list[float]
RewardFunc = Callable[..., "list[Reward]"]


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """Return the text of a completion, be it text or chat messages."""
    return completion if isinstance(completion, str) else "\n".join(str(message["content"]) for message in completion)


def extract_answer(completion: str | list[dict[str, Any]]) -> str:
    """Return what stands in the last ``<answer>…</answer>``, or else the whole completion without outer blanks."""
    answer = _tagged_answer(completion_text(completion))
    return completion_text(completion).strip() if answer is None else answer


def _tagged_answer(text: str) -> str | None:
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return tagged[-1].strip() if tagged else None


def reasoning_gym(
    prompts: list, completions: list, *, entry: list[dict | None] | None = None, **_: Any
) -> list[Reward]:
    """Return the task's own score, in [0, 1], of each extracted answer; ``entry`` is the task's own row.

    None where there is no entry, as in rows of another data set.
    """
    from reasoning_gym import get_score_answer_fn

    return [
        None
        if row is None
        else float(get_score_answer_fn(row["metadata"]["source_dataset"])(extract_answer(completion), row))
        for completion, row in zip(completions, entry or [None] * len(completions), strict=True)
    ]


def exact_match(prompts: list, completions: list, *, answer: list | None = None, **_: Any) -> list[Reward]:
    """Return 1 where the extracted answer is the column ``answer``, character for character, and 0 elsewhere.

    None where the column is empty.
    """
    answers = answer or [None] * len(completions)
    return [
        None if a is None else float(extract_answer(c) == str(a)) for c, a in zip(completions, answers, strict=True)
    ]


def math_verify(
    prompts: list, completions: list, *, answer: list | None = None, solution: list | None = None, **_: Any
) -> list[Reward]:
    """Return 1 where the completion's answer is mathematically that of the column ``answer``, or ``solution``, else 0.

    ``1/2`` is ``0.5`` is ``$\\frac{1}{2}$``: the package math-verify parses and compares them. Looked at is what stands
    in ``<answer>…</answer>`` where the completion has that, or else what math-verify finds: a ``\\boxed{}``, a formula,
    the last number. None where the column's answer cannot be parsed, as in TRL's ``accuracy_reward``.
    """
    from math_verify import verify

    nothing = [None] * len(completions)
    golds = [a if a is not None else s for a, s in zip(answer or nothing, solution or nothing, strict=True)]
    rewards: list[Reward] = []
    for completion, gold in zip(completions, golds, strict=True):
        expected = [] if gold is None else _parse_math(str(gold), bare=True)
        if not expected:
            rewards.append(None)
            continue
        text = completion_text(completion)
        tagged = _tagged_answer(text)
        given = _parse_math(text if tagged is None else tagged, bare=tagged is not None)
        rewards.append(float(verify(expected, given, timeout_seconds=_math_limit())))
    return rewards


def _parse_math(text: str, bare: bool) -> list[Any]:
    """Parse ``text``; one that is nothing but an answer (``bare``) may be LaTeX without the dollars around it."""
    from math_verify import parse

    return parse(text, parsing_timeout=_math_limit()) or (
        parse(f"${text}$", parsing_timeout=_math_limit()) if bare and text.strip() else []
    )


def _math_limit() -> int | None:
    """Seconds that math-verify may take. It is an alarm, which Python has in the main thread only."""
    return 5 if threading.current_thread() is threading.main_thread() else None


BUILT_IN: dict[str, RewardFunc] = {
    "reasoning_gym": reasoning_gym,
    "exact_match": exact_match,
    "math_verify": math_verify,
}

READS: dict[Callable[..., Any], tuple[str, ...]] = {
    reasoning_gym: ("entry",),
    exact_match: ("answer",),
    math_verify: ("answer", "solution"),
}
"""Columns, one of which each of them takes. Rows without them are of another data set, and another function's."""
