"""Where rows come from: files, directories and hub data sets, or else tasks; and which of them are held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from asyppo.config import ConfigError, DataConfig
from asyppo.data.checks import Checks
from asyppo.data.prompts import prompt_fault, prompt_key
from asyppo.data.rows import JsonLines, NotARow, Row, Rows, is_object
from asyppo.data.schedule import Permutation
from asyppo.data.tasks import generate_rows

LINES, TABLES = (".jsonl", ".ndjson"), (".parquet", ".csv", ".tsv")


def open_data(field: str, name: str, dataset_config: str | None = None, suffix: str | None = None) -> dict[str, Rows]:
    """Return each split of the file, directory or hub data set that ``data.{field}`` names, without a look at the rows.

    What has no splits comes under the name "". Raises ConfigError.
    """
    path = Path(name).expanduser()
    known = (*LINES, ".json", *TABLES)
    looks_local = path.suffix in known or path.is_absolute() or name.startswith(".")
    if looks_local and not path.exists():
        raise ConfigError(f"data.{field}: got {name!r}, but there is no such file or directory")
    if path.is_file() and path.suffix not in known:
        raise ConfigError(f"data.{field}: got {name!r}, needs a {', '.join(known)} file, a directory or a hub name")
    label, task = (path.name, path.stem) if path.exists() else (name, name)
    found: Any
    try:
        if path.is_file() and path.suffix in LINES:
            found = JsonLines(path)
        elif path.is_file() and path.suffix == ".json":
            found = _json(path)
        else:
            found = _table(path, name, dataset_config)
    except Exception as error:  # whatever the readers of all formats and the hub's client raise
        text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"data.{field}: cannot load {name!r}: {text}") from error
    if not isinstance(found, dict):
        return {"": Rows(label, found, range(len(found)), task, suffix or "")}
    return {
        split: Rows(f"{label} ({split})", table, range(len(table)), task, suffix or "")
        for split, table in found.items()
    }


def _json(path: Path) -> Any:
    """JSON lines by another name, a list of rows, a single row, or an object of such lists: splits, or a single one."""
    with open(path, "rb") as file:
        first, second = file.readline().strip(), file.readline().strip()
    if second and is_object(first):
        return JsonLines(path)
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    if not value or {"prompt", "messages"} & value.keys() or not all(isinstance(v, list) for v in value.values()):
        return [value]
    return value if len(value) > 1 or "train" in value else next(iter(value.values()))


def _table(path: Path, name: str, dataset_config: str | None) -> Any:
    import datasets  # here, since it takes most of a second

    if path.is_file() and path.suffix == ".parquet":
        return datasets.Dataset.from_parquet(str(path))
    if path.is_file():
        return datasets.Dataset.from_csv(str(path), sep="\t" if path.suffix == ".tsv" else ",")
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path) if path.exists() else name, dataset_config)


def _split(splits: dict[str, Rows], split: str, field: str) -> Rows:
    if split not in splits:
        raise ConfigError(f"data.{field}: got {split!r}, but the data set has the splits {', '.join(splits)}")
    return splits[split]


def _training_splits(config: DataConfig) -> dict[str, Rows]:
    assert config.dataset_name is not None
    return open_data("dataset_name", config.dataset_name, config.dataset_config, config.prompt_suffix)


def _training_rows(config: DataConfig) -> Rows:
    splits = _training_splits(config)
    rows = splits[""] if "" in splits else _split(splits, config.dataset_train_split, "dataset_train_split")
    return replace(rows, columns=config.columns)


def _held_out_rows(config: DataConfig) -> Rows | None:
    """Rows that are for evaluation alone, if any are."""
    if config.eval_dataset_name is not None:
        splits = open_data(
            "eval_dataset_name", config.eval_dataset_name, config.eval_dataset_config, config.prompt_suffix
        )
        if "" in splits:
            return splits[""]
        return _split(splits, config.dataset_test_split or "test", "dataset_test_split")
    if config.dataset_test_split is None:
        return None
    splits = _training_splits(config)
    if "" in splits:
        raise ConfigError(
            f"data.dataset_test_split: got {config.dataset_test_split!r}, but {config.dataset_name!r} has no splits; "
            "name the held-out rows in data.eval_dataset_name"
        )
    return _split(splits, config.dataset_test_split, "dataset_test_split")


MOST_HELD_OUT = 512
"""Prompts, where the configuration does not say."""


def load_eval_rows(config: DataConfig) -> Sequence[Row]:
    """Return the held-out rows: ``eval_size`` different prompts (None: see ``DataConfig``), drawn with ``eval_seed``.
    Raises ConfigError.

    They come from ``eval_dataset_name``, or else the split ``dataset_test_split``, or else the training rows, out of
    which ``load_train_rows`` then leaves them, or else the tasks.
    """
    rows, size = _held_out_rows(config), MOST_HELD_OUT if config.eval_size is None else config.eval_size
    if rows is not None:
        rows = Checks(config).usable(replace(rows, columns=config.columns))
    elif config.dataset_name is not None:
        rows = _training_rows(config)  # load_train_rows looks at all of them
        if config.eval_size is None:
            size = _tenth(rows)
    else:
        return generate_rows(config, size, config.eval_seed, exclude=set())
    chosen: dict[str, int] = {}
    for i in _shuffled(len(rows), f"held out, seed {config.eval_seed}"):
        if len(chosen) == size:
            break
        key = _key_of(rows, i)
        if key is not None:
            chosen.setdefault(key, i)
    if not chosen and size:
        Checks(config).usable(rows)  # says why
    return rows.take(sorted(chosen.values()))


def _tenth(rows: Rows) -> int:
    """A tenth of the different prompts of ``rows``, of two or more at least one, but at most MOST_HELD_OUT."""
    different: set[str] = set()
    for i in range(len(rows)):
        if len(different) == 10 * MOST_HELD_OUT:
            break
        if (key := _key_of(rows, i)) is not None:
            different.add(key)
    return max(len(different) // 10, int(len(different) > 1))


def _shuffled(count: int, key: str) -> Any:
    permutation = Permutation(count, key)
    for start in range(0, count, 1000):
        yield from permutation(np.arange(start, min(start + 1000, count))).tolist()


def _key_of(rows: Rows, i: int) -> str | None:
    try:
        row = rows[i]
    except NotARow:
        return None
    return None if prompt_fault(row) is not None else prompt_key(row["prompt"])


def load_train_rows(config: DataConfig, eval_rows: Sequence[Row], checks: Checks | None = None) -> Sequence[Row]:
    """Return the training rows that ``checks`` find usable (None: those with a prompt), none of whose prompts is held
    out. Raises ConfigError.

    Those of a data set are all that it has, or ``max_train_rows`` of them; of the tasks, ``train_size`` different
    prompts.
    """
    held_out = {prompt_key(row["prompt"]) for row in eval_rows}
    if config.dataset_name is None:
        return generate_rows(config, config.train_size, config.train_seed, exclude=held_out)
    rows, limit = _training_rows(config), config.max_train_rows
    if checks is None or limit is not None:
        checks = Checks(config)  # a few rows of many are tokenized when they are chosen
    usable = checks.usable(rows, exclude=held_out)
    if not usable:
        raise ConfigError(
            f"data.eval_size: got {config.eval_size}, but all {len(held_out)} different prompts of {rows.name} are "
            "held out; needs fewer, so that some are left to train on"
        )
    if limit is not None and len(usable) > limit:
        order = Permutation(len(usable), f"training rows, seed {config.train_seed}")
        usable = replace(usable.take(sorted(order(np.arange(limit)).tolist())), checked=None)
    return usable
