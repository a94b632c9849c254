"""What an environment is asked, and what becomes of answers that are none."""

from __future__ import annotations

import inspect
from asyncio import CancelledError
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LONGEST_ERROR = 200
"""Characters of an error that the policy gets to see."""
LARGEST = float(np.finfo(np.float32).max)
FAULTS = (Exception, SystemExit, CancelledError)
"""What other people's code raises; ``exit()`` in code that a policy has written, too."""


@dataclass(frozen=True)
class Step:
    """An environment's answer to an action."""

    observation: str
    reward: float = 0.0
    done: bool = False
    failed: bool = False
    """It raised, or returned what is no answer; the observation says so."""


def error_text(what: object) -> str:
    """Return an error as an observation, in one line."""
    text = " ".join(readable(str(what)).split())
    return f"error: {text[:LONGEST_ERROR]}"


def readable(text: str) -> str:
    """Return ``text`` as a tokenizer takes it, with question marks for halves of surrogate pairs."""
    return text.encode(errors="replace").decode()


def number(value: Any) -> float | None:
    """Return a number as a float, numpy's and torch's included; None where it is none that float32 holds."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return float(value) if isinstance(value, int | float) and abs(value) <= LARGEST else None


def takes(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``arguments`` that ``function`` has parameters for."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def reset(environment: Any, row: Mapping[str, Any], seed: int) -> str:
    """Begin an episode: ``reset`` gets the columns of ``row`` and the ``seed``, as far as it has parameters for them.
    Returns the first observation, empty where it has none. Raises what ``reset`` raises, and TypeError where it returns
    something else than text."""
    observation = environment.reset(**takes(environment.reset, {"seed": seed} | dict(row)))
    if observation is not None and not isinstance(observation, str):
        raise TypeError(f"reset returned {type(observation).__name__}, needs text or None")
    return readable(observation or "")


def step(environment: Any, action: str) -> Step:
    """Return the answer of the text protocol to ``action``."""
    try:
        answer = environment.step(action)
    except FAULTS as error:
        return Step(error_text(str(error) or type(error).__name__), failed=True)
    if not isinstance(answer, tuple) or len(answer) != 3:
        return Step(error_text("the environment gave no answer"), failed=True)
    observation, reward, done = answer
    earned = number(reward)
    if not isinstance(observation, str) or earned is None or not isinstance(done, bool | int | np.bool_):
        types = ", ".join(type(part).__name__ for part in answer)
        return Step(error_text(f"the environment gave no answer but {types}"), failed=True)
    return Step(readable(observation), earned, bool(done))
