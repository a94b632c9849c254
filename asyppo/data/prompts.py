"""Prompts: where they come from, which of them can be used, and which of them a step trains on.

A *row* is a prompt with any other columns. Rows of a data set stay where they are, in a file or a memory-mapped table,
and are read one at a time: ``Rows`` only remembers which of them are meant.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from asyppo.config import ConfigError, DataConfig, TaskConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("asyppo")

Prompt = str | list[dict[str, Any]]
"""Text, or chat messages: ``[{"role": …, "content": …}, …]``."""

Row = dict[str, Any]
"""A prompt (``prompt``) and the name of its task (``task``) with any other columns, all of which reach the rewards."""

_AT_ONCE = 1000  # rows in memory while all are looked at


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Some rows of ``source``, read when they are asked for."""

    name: str
    """What messages call the source."""
    source: Sequence[Row]
    places: Sequence[int]
    """Places in ``source``, counted from 0."""
    task: str | None = None
    """Value of the column ``task`` where a row has none."""
    suffix: str = ""
    """Put behind a text prompt."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """New names of columns."""
    digest: str = ""
    """Of the rows' contents, once ``fitting`` has read them: a run that is resumed has to find the same."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        """Row ``i``; a list of rows for a slice."""
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row = {self.columns.get(name, name): value for name, value in self.source[self.places[i]].items()}
        if isinstance(row.get("prompt"), str):
            row["prompt"] += self.suffix
        return row if self.task is None else {"task": self.task} | row

    def take(self, chosen: Sequence[int]) -> Rows:
        """Return the rows at ``chosen``."""
        return replace(self, places=array("q", (self.places[i] for i in chosen)))


class NotARow(ValueError):
    """What stands at a place of a source is no row; the message says why."""


class JsonLines(Sequence[Row]):
    """The lines of a JSON-lines file, by line number from 0. Only where each begins is kept in memory.

    A line that is no JSON object raises NotARow when it is asked for.
    """

    def __init__(self, path: Path):
        self.path, self.begins = path, array("q", [0])
        with open(path, "rb") as file:
            for line in file:
                self.begins.append(self.begins[-1] + len(line))
        self.file = open(path, "rb")  # noqa: SIM115, stays open as long as rows may be asked for

    def __len__(self) -> int:
        return len(self.begins) - 1

    def line(self, i: int) -> bytes:
        """Return line ``i`` without the blanks around it."""
        self.file.seek(self.begins[i])
        return self.file.read(self.begins[i + 1] - self.begins[i]).strip()

    def __getitem__(self, i: Any) -> Any:
        """Parse line ``i``."""
        try:
            row = json.loads(self.line(i))
        except json.JSONDecodeError as error:
            raise NotARow(f"no JSON: {error.msg} at column {error.colno}") from error
        except UnicodeDecodeError as error:
            raise NotARow(f"no UTF-8: {error.reason} at byte {error.start + 1}") from error
        if not isinstance(row, dict):
            raise NotARow(f"no JSON object but {_short(row)}")
        return row


# --- prompts ---


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as text to read; of chat messages, role and content."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def prompt_tokens(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Return the tokens of each prompt as the model sees it. Raises ConfigError if the tokenizer has no chat template.

    Text is tokenized as the tokenizer does by default, with its beginning-of-sequence token if it adds one; chat
    messages go through the chat template, which writes that token itself, up to where the assistant's answer begins.
    """
    # Text that a template was already applied to begins with the token that the tokenizer would add.
    added = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1] else ""
    texts, templated = [], []
    for prompt in prompts:
        templated.append(not isinstance(prompt, str))
        if isinstance(prompt, str):
            texts.append(prompt.removeprefix(added))
            continue
        if not tokenizer.chat_template:
            raise ConfigError(
                "data: prompts are chat messages, but the tokenizer has no chat template; needs text prompts, or the "
                "tokenizer of a chat model"
            )
        messages = [{key: value for key, value in message.items() if value is not None} for message in prompt]
        texts.append(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **(chat_template_kwargs or {})
            )
        )
    tokens: list[list[int]] = [[] for _ in texts]
    for kind in (False, True):
        chosen = [i for i, is_kind in enumerate(templated) if is_kind is kind]
        if chosen:
            ids = tokenizer([texts[i] for i in chosen], padding=False, add_special_tokens=not kind)["input_ids"]
            for i, prompt_ids in zip(chosen, ids, strict=True):
                tokens[i] = prompt_ids
    return tokens


def _key(prompt: Prompt) -> str:
    """Return what is the same for prompts that are the same, whatever blanks are around them."""
    return prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _prompt_fault(row: Row) -> str | None:
    """Say what is wrong with the prompt of ``row``, or None."""
    if "prompt" not in row:
        return f"no column 'prompt', only {', '.join(map(str, row)) or 'nothing'}; data.columns gives others that name"
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return None if prompt.strip() else f"prompt: got {_short(prompt)}, needs text"
    if not isinstance(prompt, list):
        return f"prompt: got {_short(prompt)}, needs text or a list of chat messages"
    if not prompt:
        return "prompt: got no chat message, needs at least one"
    for number, message in enumerate(prompt, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            return f"prompt: message {number} is {_short(message)}, needs a role and a content, both text"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- looking at all rows once ---


_BAD, _LONG = ("bad row", "bad rows"), ("prompt that is too long", "prompts that are too long")


class _Faults:
    """Gathers the rows that cannot be used; reports them in one line, an error or a warning that they are left out."""

    def __init__(
        self, name: str, what: tuple[str, str], field: Literal["bad_rows", "long_prompts"], config: DataConfig
    ):
        self.name, self.what, self.field, self.action = name, what, field, getattr(config, field)
        self.count = 0
        self.first: list[str] = []

    def add(self, number: int, fault: str) -> None:
        """Count the row of this number, from 1."""
        self.count += 1
        if len(self.first) < 3:
            self.first.append(f"row {number}: {fault}")

    def report(self) -> None:
        """Raise ConfigError, or warn, if there was any."""
        if not self.count:
            return
        more = [f"and {self.count - len(self.first)} more"] if self.count > len(self.first) else []
        rows = f"{self.name} has {self.count} {self.what[self.count > 1]}: {'; '.join([*self.first, *more])}"
        if self.action == "error":
            raise ConfigError(f"data.{self.field}: {rows}; needs other rows, or 'skip' to leave these out")
        log.warning("data.%s: %s; left out", self.field, rows)


def _read(rows: Rows, faults: _Faults) -> Iterator[list[tuple[int, Row]]]:
    """Yield all rows with their places in ``rows``, some at a time; what is no row, or has no prompt, is a fault."""
    for start in range(0, len(rows), _AT_ONCE):
        read = []
        for i in range(start, min(start + _AT_ONCE, len(rows))):
            if isinstance(rows.source, JsonLines) and not rows.source.line(rows.places[i]):
                continue  # an empty line is none
            try:
                row = rows[i]
                fault = _prompt_fault(row)
            except NotARow as error:
                fault = str(error)
            if fault is None:
                read.append((i, row))
            else:
                faults.add(rows.places[i] + 1, fault)
        yield read


def with_prompt(rows: Rows, config: DataConfig, exclude: Set[str] = frozenset(), *, report: bool = True) -> Rows:
    """Return the rows that have a prompt, without those whose ``_key`` is in ``exclude``.

    Rows without one are reported as ``config.bad_rows`` says; ``report=False`` leaves the warning out. Raises
    ConfigError if there is no row with a prompt at all.
    """
    faults = _Faults(rows.name, _BAD, "bad_rows", config)
    good, excluded = array("q"), 0
    for read in _read(rows, faults):
        for i, row in read:
            if exclude and _key(row["prompt"]) in exclude:
                excluded += 1
            else:
                good.append(i)
    if report or config.bad_rows == "error":
        faults.report()
    if not good and not excluded:
        raise ConfigError(f"data: {rows.name} has no rows with a prompt, needs at least one")
    return rows.take(good)


def fitting(rows: Sequence[Row], name: str, tokenizer: PreTrainedTokenizerBase, config: DataConfig, limit: int) -> Rows:
    """Return the rows whose prompt has at least one token and at most ``limit``, or ``config.max_prompt_length``; with
    their ``digest``.

    ``name`` is what messages call ``rows`` where they do not know it. Raises ConfigError as ``config.bad_rows`` and
    ``config.long_prompts`` say, and where no row is left of some.
    """
    rows = rows if isinstance(rows, Rows) else Rows(name, rows, range(len(rows)))
    bad = _Faults(rows.name, _BAD, "bad_rows", config)
    long = _Faults(rows.name, _LONG, "long_prompts", config)
    longest = limit if config.max_prompt_length is None else min(limit, config.max_prompt_length)
    why = "the models' positions less max_completion_length" if longest == limit else "data.max_prompt_length"
    good, digest = array("q"), hashlib.blake2b(digest_size=16)
    for read in _read(rows, bad):
        for (i, row), tokens in zip(read, _try_tokens(read, tokenizer, config), strict=True):
            if isinstance(tokens, str):
                bad.add(rows.places[i] + 1, tokens)
            elif not tokens:
                bad.add(rows.places[i] + 1, f"prompt: got {_short(row['prompt'])}, which has no tokens")
            elif len(tokens) > longest:
                long.add(rows.places[i] + 1, f"{len(tokens)} tokens, needs at most {longest}, {why}")
            else:
                good.append(i)
                # Of a column that JSON does not know, an image for example, the type alone counts.
                digest.update(json.dumps(row, default=lambda value: type(value).__name__, skipkeys=True).encode())
    bad.report()
    long.report()
    if len(rows) and not good:
        raise ConfigError(f"data: {rows.name} has no prompt that can be used, needs at least one")
    return replace(rows.take(good), digest=digest.hexdigest())


def _try_tokens(
    read: list[tuple[int, Row]], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[list[int] | str]:
    """Tokens of each prompt, or what the chat template has against it."""
    from jinja2 import TemplateError

    prompts = [row["prompt"] for _, row in read]
    try:
        return list(prompt_tokens(prompts, tokenizer, config.chat_template_kwargs))
    except (TemplateError, TypeError) as error:
        if len(read) == 1:
            return [f"the chat template refuses it: {error}"]
        return [tokens for one in read for tokens in _try_tokens([one], tokenizer, config)]


# --- sources ---


def _open(field: str, name: str, dataset_config: str | None, suffix: str | None) -> dict[str, Rows]:
    """Return each split of the file, directory or hub data set that ``data.{field}`` names, without a look at the rows.

    What has no splits comes under the name "".
    """
    path = Path(name).expanduser()
    looks_local = path.suffix in (".jsonl", ".ndjson", ".parquet") or path.is_absolute() or name.startswith(".")
    if looks_local and not path.exists():
        raise ConfigError(f"data.{field}: got {name!r}, but there is no such file or directory")
    if path.is_file() and path.suffix in (".jsonl", ".ndjson"):
        try:
            lines = JsonLines(path)
        except OSError as error:
            raise ConfigError(f"data.{field}: cannot read {name!r}: {error.strerror}") from error
        return {"": Rows(path.name, lines, range(len(lines)), path.stem, suffix or "")}
    if path.is_file() and path.suffix != ".parquet":
        raise ConfigError(f"data.{field}: got {name!r}, needs a .jsonl or .parquet file, a directory or a hub name")

    import datasets  # here, since it takes most of a second

    found: Any
    try:
        if path.is_file():
            found = datasets.Dataset.from_parquet(str(path))
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path) if path.exists() else name, dataset_config)
    except Exception as error:  # whatever the readers of all formats and the hub's client raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"data.{field}: cannot load {name!r}: {text}") from error
    label, task = (path.name, path.stem) if path.exists() else (name, name)
    if not isinstance(found, datasets.DatasetDict):
        return {"": Rows(label, found, range(len(found)), task, suffix or "")}
    return {
        split: Rows(f"{label} ({split})", table, range(len(table)), task, suffix or "")
        for split, table in found.items()
    }


def _split(splits: dict[str, Rows], split: str, field: str) -> Rows:
    if split not in splits:
        raise ConfigError(f"data.{field}: got {split!r}, but the data set has the splits {', '.join(splits)}")
    return splits[split]


def _training_splits(config: DataConfig) -> dict[str, Rows]:
    assert config.dataset_name is not None
    return _open("dataset_name", config.dataset_name, config.dataset_config, config.prompt_suffix)


def _training_rows(config: DataConfig) -> Rows:
    splits = _training_splits(config)
    rows = splits[""] if "" in splits else _split(splits, config.dataset_train_split, "dataset_train_split")
    return replace(rows, columns=config.columns)


def _held_out_source(config: DataConfig) -> Rows | None:
    """Rows that are for evaluation alone, if any are."""
    rows = _held_out_rows(config)
    return None if rows is None else replace(rows, columns=config.columns)


def _held_out_rows(config: DataConfig) -> Rows | None:
    if config.eval_dataset_name is not None:
        splits = _open("eval_dataset_name", config.eval_dataset_name, config.eval_dataset_config, config.prompt_suffix)
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


def load_eval_rows(config: DataConfig) -> Sequence[Row]:
    """Return the held-out rows: ``eval_size`` different prompts, drawn with ``eval_seed``. Raises ConfigError.

    They come from ``eval_dataset_name``, or else the split ``dataset_test_split``, or else the training rows, out of
    which ``load_train_rows`` then leaves them, or else the tasks.
    """
    source = _held_out_source(config)
    if source is not None:
        rows = with_prompt(source, config)
    elif config.dataset_name is not None:
        rows = with_prompt(_training_rows(config), config, report=False)  # load_train_rows does
    else:
        return _generate_rows(config, config.eval_size, config.eval_seed, exclude=set())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.eval_seed)).tolist()
    chosen: dict[str, int] = {}
    for i in order:
        if len(chosen) == config.eval_size:
            break
        chosen.setdefault(_key(rows[i]["prompt"]), i)
    return rows.take(sorted(chosen.values()))


def load_train_rows(config: DataConfig, eval_rows: Sequence[Row]) -> Sequence[Row]:
    """Return the training rows, none of whose prompts is held out. Raises ConfigError.

    Those of a data set are all that it has, or ``max_train_rows`` of them; of the tasks, ``train_size`` different
    prompts.
    """
    held_out = {_key(row["prompt"]) for row in eval_rows}
    if config.dataset_name is None:
        return _generate_rows(config, config.train_size, config.train_seed, exclude=held_out)
    rows = with_prompt(_training_rows(config), config, exclude=held_out)
    if not rows:
        raise ConfigError(
            f"data.eval_size: got {config.eval_size}, but all {len(held_out)} different prompts of {rows.name} are "
            "held out; needs fewer, so that some are left to train on"
        )
    if config.max_train_rows is not None and len(rows) > config.max_train_rows:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.train_seed))
        rows = rows.take(sorted(order[: config.max_train_rows].tolist()))
    return rows


def _generate_rows(config: DataConfig, size: int, seed: int, exclude: Set[str]) -> list[Row]:
    """Rows of the task, or of all tasks by weight."""
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


def _rows_of_task(
    field: str, task: TaskConfig, suffix: str | None, size: int, seed: int, exclude: Set[str]
) -> list[Row]:
    """First ``size`` generated rows in order whose prompts are new: neither repeated nor in ``exclude``."""
    import reasoning_gym  # here, since it takes most of a second

    if not size:
        return []
    try:
        dataset = reasoning_gym.create_dataset(task.name, size=20 * size, seed=seed, **task.params)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"{field}: got {task.name!r} with {task.params}, but {error}") from error
    rows: list[Row] = []
    seen = set(exclude)
    for index in range(len(dataset)):
        entry = dataset[index]
        prompt = entry["question"] + ("\n" if suffix is None else suffix)
        if (key := _key(prompt)) not in seen:
            seen.add(key)
            rows.append({"prompt": prompt, "task": task.name, "answer": entry["answer"], "entry": entry})
            if len(rows) == size:
                return rows
    raise ConfigError(
        f"{field}: {task.name!r} with {task.params} has only {len(rows)} different new prompts "
        f"among {len(dataset)}, needs {size}; ask for fewer rows or a larger task"
    )


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
