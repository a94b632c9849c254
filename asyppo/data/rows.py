"""Rows of data, which stay where they are, in a file or a memory-mapped table, and are read when they are asked for:
``Rows`` only remembers which of them are meant."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from json.scanner import make_scanner
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""A prompt (``prompt``) and the name of its task (``task``) with any other columns, all of which reach the rewards."""

AT_ONCE = 1000
"""Rows in memory while all are looked at."""


class NotARow(ValueError):
    """What stands at a place of a source is no row; the message says why."""


def short(value: Any) -> str:
    """Return ``value`` for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Kept(Sequence[int]):
    """The numbers from 0 to ``count`` - 1 without those of ``left_out``, which ascend; only these take memory."""

    def __init__(self, count: int, left_out: Sequence[int] = ()):
        self.left_out = array("q", left_out)
        self.length = count - len(self.left_out)
        # Of each number that is left out: how many before it are kept.
        self._kept_before = array("q", (number - j for j, number in enumerate(self.left_out)))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self.length))]
        if not -self.length <= i < self.length:
            raise IndexError(i)
        i %= self.length
        return i + bisect_right(self._kept_before, i)


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
    """Of the rows' contents, once they have been checked: a run that is resumed has to find the same."""
    checked: Any = None
    """What was looked for when they were checked; see ``asyppo/data/checks.py``."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        """Row ``i``; a list of rows for a slice. Raises NotARow."""
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self._row(self.source[self.places[i]])

    def blocks(self, at_once: int = AT_ONCE) -> Iterator[list[tuple[int, Row | NotARow]]]:
        """Yield all rows by their number here, some at a time, without empty lines; NotARow where there is none."""
        for start in range(0, len(self), at_once):
            stop = min(start + at_once, len(self))
            read = _read(self.source, self.places[start:stop])
            yield [(i, self._row_or_fault(row)) for i, row in enumerate(read, start) if row is not None]

    def take(self, chosen: Sequence[int]) -> Rows:
        """Return the rows at ``chosen``."""
        return replace(self, places=array("q", (self.places[i] for i in chosen)))

    def without(self, left_out: Sequence[int]) -> Rows:
        """Return the rows but those at ``left_out``, which ascend."""
        if not left_out:
            return self
        if isinstance(self.places, range) and self.places.start == 0 and self.places.step == 1:
            return replace(self, places=Kept(len(self.places), left_out))
        drop = set(left_out)
        return self.take([i for i in range(len(self)) if i not in drop])

    def _row_or_fault(self, row: Any) -> Row | NotARow:
        try:
            return self._row(row)
        except NotARow as fault:
            return fault

    def _row(self, row: Any) -> Row:
        if isinstance(row, NotARow):
            raise row
        if not isinstance(row, Mapping):
            raise NotARow(f"no row but {short(row)}")
        row = {self.columns.get(name, name): value for name, value in row.items()} if self.columns else dict(row)
        if "prompt" not in row and "messages" in row:
            row["prompt"] = _without_answer(row["messages"])
        prompt = row.get("prompt")
        if isinstance(prompt, str):
            if self.suffix:
                row["prompt"] = prompt + self.suffix
        elif isinstance(prompt, tuple) or hasattr(prompt, "tolist"):
            row["prompt"] = list(prompt) if isinstance(prompt, tuple) else prompt.tolist()
        return row if self.task is None else {"task": self.task} | row


def _without_answer(messages: Any) -> Any:
    """A conversation up to the assistant's last message, which is the answer where one is written down."""
    messages = messages.tolist() if hasattr(messages, "tolist") else messages
    if not isinstance(messages, (list, tuple)) or not messages or not isinstance(messages[-1], Mapping):
        return messages
    return list(messages[:-1] if messages[-1].get("role") == "assistant" else messages)


def _read(source: Any, places: Sequence[int]) -> list[Any]:
    """What stands at ``places``: rows, NotARow, and None for an empty line."""
    if isinstance(source, JsonLines):
        return source.read(places)
    if hasattr(source, "column_names") and places:  # a table of datasets: columns of a block at once
        together = places[-1] - places[0] == len(places) - 1
        table = source[places[0] : places[-1] + 1] if together else source[list(places)]
        return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    return [source[place] for place in places]


# --- JSON lines ---

_BLOCK = 1 << 16
_scan = make_scanner(json.JSONDecoder())  # type: ignore[arg-type]


class JsonLines(Sequence[Row]):
    """The lines of a JSON-lines file, by line number from 0. Where every 64 KiB begin is kept in memory, and no more.

    A line that is no JSON object raises NotARow when it is asked for.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file = open(path, "rb")  # noqa: SIM115, stays open as long as rows may be asked for
        # Of each block of whole lines: where it begins, and the number of its first line.
        self.begins, self.numbers = array("q", [0]), array("q", [0])
        while block := self.file.read(_BLOCK):
            block += b"" if block.endswith(b"\n") else self.file.readline()
            self.begins.append(self.begins[-1] + len(block))
            self.numbers.append(self.numbers[-1] + block.count(b"\n") + (not block.endswith(b"\n")))
        self.block, self.lines = -1, [b""]

    def __len__(self) -> int:
        return self.numbers[-1]

    def __getitem__(self, i: Any) -> Any:
        """Parse line ``i``."""
        return parsed(self.line(range(len(self))[i]))

    def line(self, i: int) -> bytes:
        """Return line ``i`` without the blanks around it."""
        block = bisect_right(self.numbers, i) - 1
        if block != self.block:
            self.file.seek(self.begins[block])
            self.lines = self.file.read(self.begins[block + 1] - self.begins[block]).split(b"\n")
            self.block = block
        return self.lines[i - self.numbers[block]].strip()

    def read(self, places: Sequence[int]) -> list[Row | NotARow | None]:
        """Parse the lines at ``places``; None where one is empty."""
        return [_row_or_fault(line) if line else None for line in map(self.line, places)]


def parsed(line: bytes) -> Row:
    """Return the JSON object that ``line`` is. Raises NotARow."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise NotARow(f"no JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise NotARow(f"no UTF-8: {error.reason} at byte {error.start + 1}") from error
    except RecursionError as error:
        raise NotARow("no JSON that can be read: it is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise NotARow(f"no JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise NotARow(f"no JSON object but {short(row)}")
    return row


def is_object(line: bytes) -> bool:
    """Whether ``line`` is a JSON object."""
    return isinstance(_row_or_fault(line), dict)


def _row_or_fault(line: bytes) -> Row | NotARow:
    try:
        text = line.decode()
        row, end = _scan(text, 0)
        plain = end == len(text) and isinstance(row, dict)
    except (ValueError, StopIteration, RecursionError):
        plain = False
    if plain:
        return row
    try:
        return parsed(line)  # says what is wrong, or reads what is rarer, such as a byte-order mark
    except NotARow as fault:
        return fault
