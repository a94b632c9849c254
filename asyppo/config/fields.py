"""What the fields of the configuration are: their paths, types, defaults and docstrings, read from the dataclasses.

``asyppo train --help``, the tables of docs/settings.md and the hint at a mistyped name are made of this.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

from asyppo.config.schema import ConfigError


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
    branch: type | None
    """The dataclass whose fields lie below it; None: it is a leaf."""

    @property
    def type(self) -> str:
        """The type in words."""
        return type_in_words(self.annotation)

    @property
    def optional(self) -> bool:
        """Whether null is a value of it."""
        return NoneType in get_args(self.annotation)


def walk(root: type, prefix: str = "") -> Iterator[Field]:
    """Yield the fields of a dataclass in order, each branch before what lies below it."""
    hints = get_type_hints(root)
    docs = {
        p.arg_name: " ".join((p.description or "").split()) for p in docstring_parser.parse_from_object(root).params
    }
    for field in fields(root):
        annotation = hints[field.name]
        branch = _branch(annotation)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        path = prefix + field.name
        yield Field(path, annotation, default, docs.get(field.name, ""), branch)
        if branch is not None:
            below = branch() if default is None else default
            for inner in walk(branch, path + "."):
                yield _with_default(inner, below, inner.path.removeprefix(path + "."))


def _branch(annotation: Any) -> type | None:
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((a for a in alternatives if isinstance(a, type) and is_dataclass(a)), None)


def _with_default(field: Field, root: Any, path: str) -> Field:
    """``field`` with the default it has in ``root``, whose class may have other defaults (``warm_start.critic``)."""
    for name in path.split("."):
        if root is None:
            return field
        root = getattr(root, name)
    return Field(field.path, field.annotation, root, field.doc, field.branch)


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


def type_in_words(annotation: Any) -> str:
    """Return what values a field takes: ``an integer``, ``one of a, b``, ``text or null``, …"""
    if is_dataclass(annotation):
        return "a mapping"
    arguments, origin = get_args(annotation), get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join("null" if a is None else str(a) for a in arguments)
    if origin in (Union, UnionType):
        return " or ".join(type_in_words(a) for a in arguments)
    if origin in (list, tuple):
        return f"a list of {type_in_words(arguments[0])}"
    words = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "text",
        dict: "a mapping",
        NoneType: "null",
    }
    return words.get(origin or annotation, "a value")


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


# What other trainers call a field: TRL, verl, OpenRLHF.
ELSEWHERE = {
    "actor_learning_rate": "learning_rate",
    "clip_ratio": "epsilon",
    "clip_ratio_high": "epsilon_high",
    "cliprange": "epsilon",
    "critic_learning_rate": "critic.learning_rate",
    "entropy_coeff": "entropy_coef",
    "eps_clip": "epsilon",
    "eval_steps": "eval.every",
    "kl_coef": "beta",
    "lambd": "lam",
    "loss_agg_mode": "loss_aggregation",
    "lr": "learning_rate",
    "max_new_tokens": "max_completion_length",
    "max_response_length": "max_completion_length",
    "model": "policy.model_name_or_path",
    "n_samples_per_prompt": "num_generations",
    "num_ppo_epochs": "num_iterations",
    "num_train_epochs": "max_steps",
    "per_device_train_batch_size": "prompts_per_step",
    "ppo_epochs": "num_iterations",
    "ppo_max_token_len_per_gpu": "max_tokens_per_micro_batch",
    "rollout_batch_size": "prompts_per_step",
    "total_training_steps": "max_steps",
    "train_batch_size": "prompts_per_step",
}


def nearest(name: str, known: Mapping[str, Any] | list[str]) -> str | None:
    """Return the known path that ``name`` was likely meant to be; None if no path is near.

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
    elsewhere = [path for path in (ELSEWHERE.get(last),) if path in known]
    return next(iter([*moved, *elsewhere, *alike]), None)


def did_you_mean(name: str, known: Mapping[str, Any] | list[str], prefix: str = "") -> str:
    """Return the end of an error's message about an unknown name."""
    near = nearest(name, known)
    return "; see --help" if near is None else f"; did you mean {prefix}{near}?"
