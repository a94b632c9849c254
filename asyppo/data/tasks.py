"""Rows that are generated: by reasoning-gym, or for an environment that ships."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from asyppo.config import ConfigError, DataConfig, TaskConfig
from asyppo.data.prompts import prompt_key
from asyppo.data.rows import Row
from asyppo.environments import TASKS


def generate_rows(config: DataConfig, size: int, seed: int, exclude: Set[str]) -> list[Row]:
    """Return ``size`` rows of the task, or of all tasks by weight, whose prompts are all different and none of whose
    ``prompt_key`` is in ``exclude``. Raises ConfigError."""
    if not config.tasks:
        return _rows_of_task("data.task", config.task, config.prompt_suffix, size, seed, exclude)
    rows: list[Row] = []
    for i, (task, share) in enumerate(zip(config.tasks, _shares([t.weight for t in config.tasks], size), strict=True)):
        rows += _rows_of_task(f"data.tasks[{i}]", task, config.prompt_suffix, share, seed, exclude)
    return rows


def _shares(weights: Sequence[float], size: int) -> list[int]:
    """Divide ``size`` in proportion to ``weights``; the largest remainders are rounded up."""
    exact = [size * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: size - sum(shares)]:
        shares[i] += 1
    return shares


def _dataset(field: str, task: TaskConfig, size: int, seed: int) -> Any:
    if task.name in TASKS:
        return TASKS[task.name](size=size, seed=seed, **task.params)
    try:
        import reasoning_gym  # here, since it takes most of a second
    except ModuleNotFoundError as error:
        if error.name != "reasoning_gym":
            raise
        raise ConfigError(
            f"{field}: got {task.name!r}, needs reasoning-gym, which is not installed: pip install 'asyppo[tasks]', or "
            "set data.dataset_name"
        ) from error
    return reasoning_gym.create_dataset(task.name, size=size, seed=seed, **task.params)


def _rows_of_task(
    field: str, task: TaskConfig, suffix: str | None, size: int, seed: int, exclude: Set[str]
) -> list[Row]:
    """First ``size`` generated rows in order whose prompts are new: neither repeated nor in ``exclude``."""
    if not size:
        return []
    try:
        dataset = _dataset(field, task, 20 * size, seed)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"{field}: got {task.name!r} with {task.params}, but {error}") from error
    rows: list[Row] = []
    seen = set(exclude)
    for index in range(len(dataset)):
        entry = dataset[index]
        prompt = entry["question"] + ("\n" if suffix is None else suffix)
        if (key := prompt_key(prompt)) not in seen:
            seen.add(key)
            rows.append({"prompt": prompt, "task": task.name, "answer": entry["answer"], "entry": entry})
            if len(rows) == size:
                return rows
    raise ConfigError(
        f"{field}: {task.name!r} with {task.params} has only {len(rows)} different new prompts "
        f"among {len(dataset)}, needs {size}; ask for fewer rows or a larger task"
    )
