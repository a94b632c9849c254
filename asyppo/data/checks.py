"""A look at every row, once: which of them can be used, and a digest of their contents."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from asyppo.config import ConfigError, DataConfig
from asyppo.data.bounds import tokens_per_byte
from asyppo.data.prompts import added_tokens, prompt_fault, prompt_key, prompt_texts, prompt_tokens, short_text
from asyppo.data.rows import NotARow, Row, Rows, short
from asyppo.run.progress import ProgressDisplay

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("asyppo")


@dataclass(frozen=True)
class Need:
    """What a reward function reads of a row."""

    name: str
    """The function's."""
    columns: tuple[str, ...]
    """Columns it cannot be called without."""
    any_of: tuple[str, ...] = ()
    """Columns one of which it takes; a row without them is another function's."""

    def missing(self, row: Row) -> str | None:
        """Return a column that has to be in ``row`` and is not, or None."""
        return next((name for name in self.columns if name not in row), None)

    def is_its_own(self, row: Row) -> bool:
        """Whether the function may have a reward for ``row``."""
        return not self.any_of or any(name in row for name in self.any_of)


@dataclass(frozen=True)
class Fit:
    """What prompts have to fit."""

    tokenizer: PreTrainedTokenizerBase
    limit: int
    """Tokens that a prompt may have, for the models' positions."""
    vocab_size: int | None = None
    """Embeddings that the models have; None: not known."""

    @cached_property
    def beyond(self) -> bool:
        """Whether the tokenizer has tokens that the models have not."""
        return self.vocab_size is not None and max(self.tokenizer.get_vocab().values(), default=-1) >= self.vocab_size

    @cached_property
    def tokens_per_byte(self) -> int | None:
        """As the function has it; None also where the models do not have every token."""
        return None if self.beyond else tokens_per_byte(self.tokenizer)

    def certain_bytes(self, longest: int) -> int:
        """Return how many bytes a text may have so that it certainly has 1 to ``longest`` tokens; 0: not known."""
        if self.tokens_per_byte is None:
            return 0
        return max(0, (longest - sum(map(len, added_tokens(self.tokenizer)))) // self.tokens_per_byte)

    def fault(self, tokens: Sequence[int]) -> str | None:
        """Say what is wrong with the tokens of a prompt but for their number, or None."""
        if not tokens:
            return "it has no tokens"
        if self.beyond and self.vocab_size is not None and (most := max(tokens)) >= self.vocab_size:
            return (
                f"its token {self.tokenizer.convert_ids_to_tokens(most)!r} is number {most}, beyond the models' "
                f"{self.vocab_size} embeddings; needs the tokenizer that the models were trained with, or models with "
                "more embeddings"
            )
        return None


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


# Of a column that JSON does not know, an image for example, the type alone counts.
_ENCODER = json.JSONEncoder(default=lambda value: type(value).__name__, skipkeys=True, check_circular=False)


@dataclass(frozen=True)
class Checks:
    """What has to be right about rows: a prompt, and whatever else is given here."""

    config: DataConfig
    fit: Fit | None = None
    """None: prompts are not tokenized."""
    needs: Sequence[Need] = ()

    def usable(self, rows: Rows, exclude: Set[str] = frozenset(), *, report: bool = True) -> Rows:
        """Return the rows that can be used, without those whose ``prompt_key`` is in ``exclude``; with a digest of
        their contents. Rows that were found usable by the same checks stay themselves.

        Others are reported as ``config.bad_rows`` and ``config.long_prompts`` say; ``report=False`` leaves warnings
        out. Raises ConfigError, also where there are rows but none of them can be used, or none has a column that a
        reward function needs.
        """
        if rows.checked == self._what() and not exclude:
            return rows
        look = _Look(self, rows, exclude)
        with ProgressDisplay(f"rows of {rows.name}", len(rows), seconds=5.0) as display:
            for block in rows.blocks():
                look.at(block)
                display.advance(count=len(block))
        look.needs.report()
        if report or self.config.bad_rows == "error":
            look.bad.report()
        look.long.report()
        if not look.with_prompt:
            raise ConfigError(f"data: {rows.name} has no rows with a prompt, needs at least one")
        if not look.good and not look.excluded:
            raise ConfigError(f"data: {rows.name} has no prompt that can be used, needs at least one")
        return replace(rows.without(look.left_out), digest=look.digest.hexdigest(), checked=self._what())

    def _what(self) -> Any:
        fit = self.fit and (id(self.fit.tokenizer), self.fit.limit, self.fit.vocab_size)
        return fit, tuple(self.needs), str(self.config)


class _Look:
    """What has been seen of some rows so far."""

    def __init__(self, checks: Checks, rows: Rows, exclude: Set[str]):
        config = checks.config
        self.checks, self.rows, self.exclude = checks, rows, exclude
        self.bad = _Faults(rows.name, _BAD, "bad_rows", config)
        self.long = _Faults(rows.name, _LONG, "long_prompts", config)
        self.needs = _Needs(checks.needs)
        limit = checks.fit.limit if checks.fit is not None else 0
        self.longest = limit if config.max_prompt_length is None else min(limit, config.max_prompt_length)
        own = "the models' positions less max_completion_length"
        self.why = own if self.longest == limit else "data.max_prompt_length"
        self.certain_bytes = checks.fit.certain_bytes(self.longest) if checks.fit is not None else 0
        self.digest = hashlib.blake2b(digest_size=16)
        self.with_prompt = self.good = self.excluded = 0
        self.seen = -1  # number of the last row
        self.left_out = array("q")

    def at(self, block: list[tuple[int, Row | NotARow]]) -> None:
        """Look at some more rows."""
        left = dict(self._with_prompt(block))
        good = left if self.checks.fit is None else dict(self._fitting(left, self.checks.fit))
        self.good += len(good)
        self.digest.update(_encoded(list(good.values())))
        last = block[-1][0] if block else self.seen
        self.left_out.extend(i for i in range(self.seen + 1, last + 1) if i not in good)
        self.seen = last

    def _with_prompt(self, block: list[tuple[int, Row | NotARow]]) -> Iterator[tuple[int, Row]]:
        for i, row in block:
            fault = str(row) if isinstance(row, NotARow) else prompt_fault(row)
            if fault is not None or isinstance(row, NotARow):
                self._bad(i, fault or "")
                continue
            self.with_prompt += 1
            if self.exclude and prompt_key(row["prompt"]) in self.exclude:
                self.excluded += 1
            elif (fault := self.needs.fault(row)) is not None:
                self._bad(i, fault)
            else:
                yield i, row

    def _fitting(self, rows: dict[int, Row], fit: Fit) -> Iterator[tuple[int, Row]]:
        prompts = [row["prompt"] for row in rows.values()]
        all_tokens = _try_tokens(prompts, fit.tokenizer, self.checks.config, self.certain_bytes)
        for (i, row), tokens in zip(rows.items(), all_tokens, strict=True):
            if tokens is None:
                yield i, row
                continue
            fault = tokens if isinstance(tokens, str) else fit.fault(tokens)
            if fault is not None:
                self._bad(i, f"prompt: got {short(row['prompt'])}, but {fault}")
            elif len(tokens) > self.longest:
                what = f"{len(tokens)} tokens, needs at most {self.longest}, {self.why}"
                self.long.add(self.rows.places[i] + 1, what)
            else:
                yield i, row

    def _bad(self, i: int, fault: str) -> None:
        self.bad.add(self.rows.places[i] + 1, fault)


class _Needs:
    """Which columns that reward functions need are in which rows."""

    def __init__(self, needs: Sequence[Need]):
        self.needs = needs
        self.rows = 0
        self.without: dict[tuple[str, str], int] = {}  # rows, by the function and what it needs
        self.there: dict[str, None] = {}
        self.all_choose = bool(needs) and all(need.any_of for need in needs)

    def fault(self, row: Row) -> str | None:
        """Say what ``row`` lacks, or None."""
        if not self.needs:
            return None
        self.rows += 1
        faults = []
        for need in self.needs:
            column = need.missing(row)
            if column is not None:
                faults.append((need.name, repr(column)))
            elif self.all_choose and not need.is_its_own(row):
                faults.append((need.name, " or ".join(map(repr, need.any_of))))
        if not faults or (self.all_choose and len(faults) < len(self.needs)):
            return None
        self.there.update(dict.fromkeys(str(name) for name in row if name != "prompt"))
        for fault in faults:
            self.without[fault] = self.without.get(fault, 0) + 1
        function, column = faults[0]
        return f"no column {column}, which the reward function {function} needs"

    def report(self) -> None:
        """Raise ConfigError if no row has what a function needs: then it is not the rows that are wrong."""
        for (function, column), count in self.without.items():
            if count == self.rows:
                raise ConfigError(
                    f"reward_funcs: {function} needs a column {column}, but the data has "
                    f"{short_text(', '.join(self.there)) or 'none'}"
                )


def _encoded(rows: list[Row]) -> bytes:
    try:
        return _ENCODER.encode(rows).encode()
    except (RecursionError, ValueError, OverflowError):  # beyond what JSON holds, in one of them: its columns count
        return repr([sorted(map(str, row)) for row in rows]).encode()


def _try_tokens(
    prompts: list[Any], tokenizer: PreTrainedTokenizerBase, config: DataConfig, certain_bytes: int
) -> Sequence[list[int] | str | None]:
    """Tokens of each prompt, or what the tokenizer or the chat template has against it; None where its text has 1 to
    ``certain_bytes`` bytes, so that it is not tokenized."""
    kwargs = config.chat_template_kwargs
    try:
        texts = prompt_texts(prompts, tokenizer, kwargs) if certain_bytes else [""] * len(prompts)
        unsure = [i for i, text in enumerate(texts) if not 0 < len(text.encode()) <= certain_bytes]
        found: list[list[int] | str | None] = [None] * len(prompts)
        for i, tokens in zip(unsure, prompt_tokens([prompts[i] for i in unsure], tokenizer, kwargs), strict=True):
            found[i] = tokens
        return found
    except ConfigError:
        raise
    except Exception as error:  # whatever a template does with what it has not been made for
        if len(prompts) == 1:
            who = "tokenizer" if isinstance(prompts[0], str) else "chat template"
            return [f"the {who} refuses it: {short_text(str(error)) or type(error).__name__}"]
        return [tokens for one in prompts for tokens in _try_tokens([one], tokenizer, config, certain_bytes)]


def fitting(rows: Sequence[Row], name: str, checks: Checks) -> Rows:
    """Return the rows that can be used, ``checks`` says for what; no rows at all are no fault. ``name`` is what
    messages call ``rows`` where they do not know it. Raises ConfigError."""
    rows = rows if isinstance(rows, Rows) else Rows(name, rows, range(len(rows)))
    return checks.usable(rows) if len(rows) else replace(rows, digest=hashlib.blake2b(digest_size=16).hexdigest())
