"""Rows as Python programs have them: lists, data sets, tables, streams."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from asyppo.config import ConfigError, DataConfig
from asyppo.data.rows import Row, Rows, short


def given_rows(given: Any, field: str, split: str, config: DataConfig) -> Sequence[Row]:
    """Return ``given``, which messages call ``field``, as rows that can be asked for by number. Raises ConfigError.

    Lists, ``datasets.Dataset``, torch data sets with a length and the like stay where they are; a ``DataFrame`` becomes
    its records, None where a cell is empty, as in ``datasets.Dataset.from_pandas``. What can only be gone through (an
    ``IterableDataset``, a generator) is read to its end, or to ``data.max_train_rows``, into memory: passes over it are
    shuffled. Of a mapping of splits, such as a ``DatasetDict``, the one named ``split`` is taken.
    """
    if given is None:
        return []
    if isinstance(given, (str, bytes)):
        raise ConfigError(f"{field}: got {short(given)}, needs rows; a file or a name on the hub is data.dataset_name")
    if isinstance(given, Mapping):
        if split not in given:
            names = ", ".join(map(str, given)) or "nothing"
            raise ConfigError(
                f"{field}: got {type(given).__name__} of {names}, needs one of them, or one named {split}"
            )
        return given_rows(given[split], field, split, config)
    if hasattr(given, "to_dict") and hasattr(given, "iloc"):  # pandas
        return given.astype(object).where(given.notna(), None).to_dict("records")
    if hasattr(given, "to_dicts"):  # polars
        return given.to_dicts()
    if hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        return given
    if isinstance(given, Iterable):
        return list(islice(given, config.max_train_rows))
    raise ConfigError(f"{field}: got {type(given).__name__}, needs a sequence of rows, a data set or a stream of them")


def given_eval_rows(given: Any, field: str, config: DataConfig) -> Sequence[Row]:
    """Return the rows of ``given`` as ``given_rows`` does; those of a mapping are all taken, each data set of it as the
    task by which it is named (TRL's several data sets for evaluation), unless it has ``dataset_test_split``. Raises
    ConfigError."""
    split = config.dataset_test_split or "test"
    if not isinstance(given, Mapping) or split in given:
        return given_rows(given, field, split, config)
    rows: list[Row] = []
    for task, each in given.items():
        source = given_rows(each, f"{field}[{task!r}]", split, config)
        named = Rows(f"{field}[{task!r}]", source, range(len(source)), task=str(task))
        rows += [row for block in named.blocks() for _, row in block]  # type: ignore[misc]
    return rows
