"""Environments between the turns of a response, and tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.config.references import load, resolve
from asyppo.config.rules import check_environment
from asyppo.data.rows import Row
from asyppo.environments import ENVIRONMENTS
from asyppo.rollout.environments.playing import Episode, Factory, Played, Playing, episode_metrics
from asyppo.rollout.environments.rewarding import episode_rewards
from asyppo.rollout.environments.sessions import Tool

__all__ = [
    "Episode",
    "Factory",
    "Played",
    "Playing",
    "Tool",
    "environment_of",
    "episode_metrics",
    "episode_rewards",
    "own_rows",
    "playing_of",
]


def environment_of(
    config: AsyPPOConfig,
    environment_factory: Factory | Mapping[str, Factory] | None = None,
    tools: Sequence[Tool] = (),
) -> tuple[dict[str | None, Factory], list[Tool]]:
    """Return what makes environments, by the column ``environment`` of a row (None: for all rows), and the tools beside
    them, as they are given or as ``config.environment`` names them; both empty where there are none. Raises
    ConfigError."""
    settings = config.environment
    if settings.name is not None:
        if environment_factory is not None:
            raise ConfigError(f"environment.name: got {settings.name!r}, needs none beside an environment_factory")
        environment_factory = partial(resolve("environment.name", settings.name, ENVIRONMENTS), **settings.params)
    factories: dict[str | None, Factory] = {}
    if isinstance(environment_factory, Mapping):
        factories.update(environment_factory)
    elif environment_factory is not None:
        factories[None] = environment_factory
    found: list[Callable[..., Any]] = [*tools, *(load("environment.tools", name) for name in settings.tools)]
    if factories or found:
        check_environment(config)
    elif config.environment_credit == "drop":
        raise ConfigError("environment_credit: got 'drop', needs an environment, whose answers bring it")
    return factories, found


def own_rows(factories: Mapping[str | None, Factory], config: AsyPPOConfig) -> list[Row] | None:
    """Return the rows where none are given: of an environment that owns the data, whose ``reset`` returns the prompt,
    empty user messages for a step, as in TRL. None: there is no environment. Raises ConfigError."""
    if not factories:
        return None
    if None not in factories:
        raise ConfigError("train_dataset: got none, needs rows with a column environment, which names one of several")
    return [{"prompt": [{"role": "user", "content": ""}]} for _ in range(config.prompts_per_step)]


def playing_of(
    environment: tuple[Mapping[str | None, Factory], Sequence[Tool]],
    tokenizer: PreTrainedTokenizerBase,
    config: AsyPPOConfig,
    eos_token_ids: Sequence[int],
    longest: int,
) -> Playing | None:
    """Return what plays the episodes of an ``environment`` (see ``environment_of``), None where there is none, whose
    responses have one turn. Raises ConfigError."""
    factories, tools = environment
    if not factories and not tools:
        return None
    return Playing(factories, tools, tokenizer, config, eos_token_ids, longest)
