"""How a setting is declared: its default, and beside it every other fact of it that the code acts on.

::

    num_critics: int = setting(2, at_least=1)
    learning_rate: float = setting(1e-6, above=0, elsewhere=("lr", "actor_learning_rate"))
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from asyppo.config.errors import ConfigError


@dataclass(frozen=True)
class Facts:
    """What holds of a setting besides its name, type, default and docstring."""

    at_least: float | None = None
    """Lower bound of a number, itself allowed."""
    above: float | None = None
    """Lower bound of a number, itself not allowed."""
    at_most: float | None = None
    """Upper bound of a number, itself allowed."""
    below: float | None = None
    """Upper bound of a number, itself not allowed."""
    noun: str = "number"
    """What errors call a number that is no integer: ``fraction``, ``number of seconds``."""
    may_change: bool = False
    """Whether a resumed run may change it; of a branch: all that lies below it, too."""
    elsewhere: tuple[str, ...] = ()
    """What other trainers (TRL, verl, OpenRLHF) call it."""
    renamed_from: tuple[str, ...] = ()
    """Names it had before, in the same branch."""

    @property
    def bounded(self) -> bool:
        """Whether there are bounds."""
        return any(bound is not None for bound in (self.at_least, self.above, self.at_most, self.below))

    def allows(self, number: float) -> bool:
        """Whether a number is within the bounds; NaN is within none."""
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )


def setting(
    default: Any = MISSING,
    *,
    factory: Any = MISSING,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    noun: str = "number",
    may_change: bool = False,
    elsewhere: tuple[str, ...] = (),
    renamed_from: tuple[str, ...] = (),
) -> Any:
    """Declare a field of the configuration with a ``default``, or with what ``factory()`` makes, and its ``Facts``."""
    facts = Facts(at_least, above, at_most, below, noun, may_change, elsewhere, renamed_from)
    if default is MISSING:
        return field(default_factory=factory, metadata={"facts": facts})
    return field(default=default, metadata={"facts": facts})


def one_or_list(name: str, value: Any) -> Any:
    """Return the list that a name in its place stands for; ``name`` is the setting's. Other values stay themselves."""
    if not isinstance(value, str):
        return value
    return [] if (name, value) == ("report_to", "none") else [value]


def facts_of(declared: Field) -> Facts:
    """Return the facts of a dataclass's field; one that is declared without ``setting`` has none."""
    return declared.metadata.get("facts", Facts())


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type that there is."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def in_words(annotation: Any, facts: Facts) -> str:
    """Return what values a setting takes: ``an integer of at least 1``, ``one of a, b``, ``text or null``, …"""
    return " or ".join(_one_in_words(a, facts) for a in alternatives(annotation))


def _one_in_words(annotation: Any, facts: Facts) -> str:
    if is_dataclass(annotation):
        return "a mapping"
    arguments, origin = get_args(annotation), get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join("null" if a is None else str(a) for a in arguments)
    if origin in (list, tuple):
        return f"a list of {in_words(arguments[0], Facts())}"
    if annotation is int:
        return _bounded("an", "integer", facts)
    if annotation is float:
        return _bounded("a", facts.noun, facts)
    words = {bool: "true or false", str: "text", dict: "a mapping", NoneType: "null"}
    return words.get(origin or annotation, "a value")


def _bounded(article: str, noun: str, facts: Facts) -> str:
    if facts.above == 0 and facts.below == math.inf:
        return f"a positive, finite {noun}"
    if facts.above == 0 and facts.at_most is None and facts.below is None:
        return f"a positive {noun}"
    low = facts.at_least if facts.above is None else facts.above
    high = facts.at_most if facts.below is None else facts.below
    if low is not None and high is not None:
        left, right = "[" if facts.above is None else "(", "]" if facts.below is None else ")"
        return f"{article} {noun} in {left}{low:g}, {high:g}{right}"
    if low is not None:
        return f"{article} {noun} {'of at least' if facts.above is None else 'above'} {low:g}"
    if high is not None:
        return f"{article} {noun} {'of at most' if facts.below is None else 'below'} {high:g}"
    return f"{article} {noun}"


def need(ok: bool, name: str, got: Any, needs: str) -> None:
    """Raise ConfigError unless ``ok``."""
    if not ok:
        raise ConfigError(f"{name}: got {got!r}, needs {needs}")


@cache
def hints(root: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    return get_type_hints(root)


def check(tree: Any, prefix: str = "") -> None:
    """Raise ConfigError at the first setting of a dataclass tree whose value its declaration does not allow: a number
    out of bounds, an empty list, none of the choices."""
    for name, declared, value in _leaves(tree, prefix):
        annotation, facts = declared
        if not _allowed(value, annotation, facts):
            raise ConfigError(f"{name}: got {value!r}, needs {in_words(annotation, facts)}")


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, tuple[Any, Facts], Any]]:
    cls: type = type(tree)
    for declared in fields(tree):
        name, value = prefix + declared.name, getattr(tree, declared.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{name}.")
            continue
        yield name, (hints(cls)[declared.name], facts_of(declared)), value
        for index, entry in enumerate(value if isinstance(value, list) else []):
            if is_dataclass(entry):
                yield from _leaves(entry, f"{name}[{index}].")


def _allowed(value: Any, annotation: Any, facts: Facts) -> bool:
    kinds = alternatives(annotation)
    if value is None and NoneType in kinds:
        return True
    if facts.bounded:
        return isinstance(value, int | float) and facts.allows(value)
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return not choices or value in choices or (bool in kinds and isinstance(value, bool))
