"""Prompts: where they come from, and which of them a step trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from asyppo.config import ConfigError, DataConfig

Row = dict[str, Any]
"""A prompt (``prompt``, text) with any other columns, all of which reach the reward functions."""


def _generate_rows(config: DataConfig, size: int, seed: int, exclude: set[str]) -> list[Row]:
    """First ``size`` generated rows in order whose prompts are new: neither repeated nor in ``exclude``."""
    import reasoning_gym  # here, since it takes most of a second

    try:
        dataset = reasoning_gym.create_dataset(config.task.name, size=20 * size, seed=seed, **config.task.params)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"data.task: got {config.task.name!r} with {config.task.params}, but {error}") from error
    rows: list[Row] = []
    seen = set(exclude)
    for index in range(len(dataset)):
        entry = dataset[index]
        prompt = entry["question"] + config.prompt_suffix
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "answer": entry["answer"], "entry": entry})
            if len(rows) == size:
                return rows
    raise ConfigError(
        f"data.task: {config.task.name!r} with {config.task.params} has only {len(rows)} different new prompts "
        f"among {len(dataset)}, needs {size}; ask for fewer rows or a larger task"
    )


def load_eval_rows(config: DataConfig) -> list[Row]:
    """Return the held-out rows: ``eval_size`` different prompts."""
    return _generate_rows(config, config.eval_size, config.eval_seed, exclude=set())


def load_train_rows(config: DataConfig, eval_rows: Sequence[Row]) -> list[Row]:
    """Return the training rows: ``train_size`` different prompts, none of them held out."""
    return _generate_rows(config, config.train_size, config.train_seed, exclude={row["prompt"] for row in eval_rows})


class PromptSchedule:
    """Which rows step s trains on: shuffled passes over the data, as a function of the seed and s alone.

    Nothing is remembered between steps, so a run that starts again at step s sees what it would have seen.
    """

    def __init__(self, num_rows: int, prompts_per_step: int, seed: int):
        if num_rows < 1:
            raise ConfigError(f"data: got {num_rows} training rows, needs at least 1")
        self.num_rows, self.prompts_per_step, self.seed = num_rows, prompts_per_step, seed

    def _pass(self, index: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return torch.randperm(self.num_rows, generator=generator).tolist()

    def rows_of_step(self, step: int) -> list[int]:
        """Row numbers of ``step`` (counted from 0)."""
        first, last = step * self.prompts_per_step, (step + 1) * self.prompts_per_step
        passes = {p: self._pass(p) for p in range(first // self.num_rows, (last - 1) // self.num_rows + 1)}
        return [passes[i // self.num_rows][i % self.num_rows] for i in range(first, last)]
