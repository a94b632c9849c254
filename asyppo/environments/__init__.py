"""Environments that ship: small, seeded, without downloads, and each with a policy that knows its format.

Each is of the text protocol: ``reset(…) -> observation`` with the columns of a row and a ``seed``, and
``step(action) -> observation, reward, done``. ``DEMONSTRATIONS`` is what a warm start learns its format from.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from asyppo.environments.calculator import Calculator, calculate
from asyppo.environments.grid_world import GridWorld, GridWorlds, walk
from asyppo.environments.second_try import SecondTry
from asyppo.environments.word_guessing import WordGuessing, WordPuzzles, guess_word

ENVIRONMENTS: dict[str, Callable[..., Any]] = {
    "calculator": Calculator,
    "grid_world": GridWorld,
    "second_try": SecondTry,
    "word_guessing": WordGuessing,
}
"""By the name that ``environment.name`` takes."""

TASKS: dict[str, Callable[..., Any]] = {"grid_world": GridWorlds, "word_guessing": WordPuzzles}
"""Data of their own by the name that ``data.task`` takes, made as reasoning-gym's are: ``(size, seed, …)``, a sequence
of entries with question, answer and metadata."""

TASKS_OF: dict[str, list[str]] = {
    "calculator": ["chain_sum"],
    "grid_world": ["grid_world"],
    "word_guessing": ["word_guessing"],
}
"""Tasks whose rows an environment takes; ``second_try`` takes all of reasoning-gym's."""

Demonstration = Callable[[Any, float, float, Random], str]
"""``(environment, noise, guess, rng) -> action``: the next action of one that knows the environment, with mistakes."""

DEMONSTRATIONS: dict[str, Demonstration] = {
    "calculator": calculate,
    "grid_world": walk,
    "word_guessing": guess_word,
}
"""By environment; the answers in ``second_try`` are the solutions of its task."""
