"""What the fields of the configuration are: their paths, types, defaults, docstrings and other facts, read from the
dataclasses.

``asyppo train --help``, the table in ``docs/settings.md`` and the hint at a mistyped name are made of this.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import docstring_parser

from asyppo.config.errors import ConfigError
from asyppo.config.setting import Facts, alternatives, facts_of, hints, in_words


@dataclass(frozen=True)
class Field:
    """One field of the tree."""

    path: str
    """Its name from the root, such as ``critic.num_critics``."""
    annotation: Any
    """Its type."""
    default: Any
    """Its default; of a branch that is null by default, the default it has once the branch is there."""
    doc: str
    """Its docstring on one line."""
    facts: Facts
    """What else was declared of it."""
    branch: type | None
    """The dataclass whose fields lie below it, where a second source adds to what a first one says. None: it is a leaf,
    which a second source replaces, a mapping or a list as a whole."""

    @property
    def values(self) -> str:
        """What values it takes, in words."""
        return in_words(self.annotation, self.facts)

    @property
    def optional(self) -> bool:
        """Whether null is a value of it."""
        return NoneType in get_args(self.annotation)

    @property
    def is_mapping(self) -> bool:
        """Whether it is a leaf that holds a mapping."""
        return any((get_origin(a) or a) is dict for a in alternatives(self.annotation))

    @property
    def is_list_of_names(self) -> bool:
        """Whether it is a list whose entries are text, and not text by itself, too."""
        if str in alternatives(self.annotation):
            return False
        lists = [a for a in alternatives(self.annotation) if get_origin(a) is list]
        entries = [entry for a in lists for entry in get_args(a)]
        return bool(entries) and all(entry is str or get_origin(entry) is Literal for entry in entries)

    @property
    def entry(self) -> type | None:
        """The dataclass that the entries of a list are of, if they are of one."""
        return _dataclass_in(get_args(self.annotation)) if get_origin(self.annotation) is list else None

    @property
    def renamed_from(self) -> list[str]:
        """The paths it had before."""
        prefix = self.path.rpartition(".")[0]
        return [f"{prefix}.{name}".lstrip(".") for name in self.facts.renamed_from]


def walk(root: type, prefix: str = "") -> Iterator[Field]:
    """Yield the fields of a dataclass in order, each branch before what lies below it."""
    docs = {
        p.arg_name: " ".join((p.description or "").split()) for p in docstring_parser.parse_from_object(root).params
    }
    for field in fields(root):
        annotation = hints(root)[field.name]
        branch = _dataclass_in(alternatives(annotation))
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        path = prefix + field.name
        yield Field(path, annotation, default, docs.get(field.name, ""), facts_of(field), branch)
        if branch is not None:
            below = branch() if default is None else default
            for inner in walk(branch, path + "."):
                yield _with_default(inner, below, inner.path.removeprefix(path + "."))


def _dataclass_in(types: tuple[Any, ...]) -> type | None:
    return next((a for a in types if isinstance(a, type) and is_dataclass(a)), None)


def _with_default(field: Field, root: Any, path: str) -> Field:
    """``field`` with the default it has in ``root``, whose class may have other defaults (``warm_start.critic``)."""
    for name in path.split("."):
        if root is None:
            return field
        root = getattr(root, name)
    return replace(field, default=root)


def groups(root: type) -> dict[str, list[Field]]:
    """Return the leaves of a dataclass, and the branches that may be null, by the branch they stand in; "" is the
    root, and comes first."""
    found: dict[str, list[Field]] = {"": []}
    for field in walk(root):
        if field.branch is not None:
            found[field.path] = []
        if field.branch is None or field.optional:
            found[field.path.rpartition(".")[0]].append(field)
    return {path: leaves for path, leaves in found.items() if leaves}


@cache
def by_path(root: type) -> dict[str, Field]:
    """Return every field of a dataclass by its path."""
    return {field.path: field for field in walk(root)}


@cache
def may_change(root: type) -> list[str]:
    """Return the paths of what a resumed run may change; all that lies below a branch among them may change, too."""
    return [field.path for field in walk(root) if field.facts.may_change]


def stands_in(path: str, branches: list[str]) -> bool:
    """Whether a path is among ``branches``, or lies below one of them."""
    return any(f"{path}.".startswith(f"{branch}.") for branch in branches)


def renamed(root: type) -> dict[str, str]:
    """Return the paths that fields have now by those they had before."""
    return {old: field.path for field in walk(root) for old in field.renamed_from}


def check_names(root: type, tree: Any, where: str, prefix: str = "") -> None:
    """Raise ConfigError at the first key of a nested mapping that names no field; ``where`` ends the message."""
    known = by_path(root)
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'config'}: got {tree!r}{where}, needs a mapping of settings")
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path not in known:
            raise ConfigError(f"{path}: unknown key{where}{did_you_mean(path, known)}")
        if known[path].branch is not None and not (value is None and known[path].optional):
            check_names(root, value, where, path + ".")
        entry = known[path].entry
        if entry is not None and isinstance(value, list):
            for index, inner in enumerate(value):
                check_names(entry, inner, f" of {path}[{index}]{where}")


def nearest(name: str, known: Mapping[str, Field | None]) -> str | None:
    """Return the known path that ``name`` was likely meant to be; None if no path is near. ``known`` may hold names
    that are no fields, such as those of commands.

    A name that is right, or nearly, but for where it stands (``num_critics``) comes first, then what other trainers
    call a field, then the most alike in letters.
    """
    last = name.rsplit(".", 1)[-1]
    ends = {path: path.rsplit(".", 1)[-1] for path in known}
    end = difflib.get_close_matches(last, set(ends.values()), n=1, cutoff=0.85)  # a letter may be wrong
    moved = [path for path in known if ends[path] in end]
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    # A name can stand in several branches; the nearest of them is the most alike as a whole.
    moved = difflib.get_close_matches(name, moved, n=1, cutoff=0.0)
    elsewhere = [path for path, field in known.items() if field is not None and last in field.facts.elsewhere]
    return next(iter([*moved, *elsewhere, *alike]), None)


def did_you_mean(name: str, known: Mapping[str, Field | None], prefix: str = "") -> str:
    """Return the end of an error's message about an unknown name."""
    for path, field in known.items():
        if field is not None and name in field.renamed_from:
            return f"; its name is {prefix}{path} now"
    near = nearest(name, known)
    return "; see --help" if near is None else f"; did you mean {prefix}{near}?"
