"""A configuration from a name, a file or a mapping, and from several of them laid over each other.

The command line checks files, values and errors by the same functions, so that a setting means the same everywhere.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from asyppo.config.errors import ConfigError
from asyppo.config.fields import by_path, check_names, did_you_mean
from asyppo.config.schema import AsyPPOConfig
from asyppo.config.setting import one_or_list

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

Settings = dict[str, Any]
"""What a YAML file of settings holds: nested dictionaries."""

READY_CONFIGS = {path.stem: path for path in sorted(Path(str(files("asyppo.config") / "ready")).glob("*.yaml"))}
"""The configurations that come along, by name."""


def load_config(
    source: str | Path | Mapping[str, Any] = "default", changes: Mapping[str, Any] | None = None
) -> AsyPPOConfig:
    """Return the validated configuration of ``source``: the name of a ready configuration, a YAML file, or a nested
    mapping of settings. What it does not say has its default.

    ``changes``, a mapping, is laid over it: ``load_config("qwen3-8b", {"critic": {"num_critics": 4}})``. Raises
    ConfigError, which names the setting, what it got and what it needs, for what ``asyppo train`` would refuse.
    """
    if isinstance(source, Mapping):
        check_names(AsyPPOConfig, source, "")
        tree = listed(source)
    else:
        tree = read_settings(config_file(source))
    if changes is not None:
        check_names(AsyPPOConfig, changes, " in the changes")
        tree = merged(tree, listed(changes))
    return _typed(tree)


def config_file(name: str | Path, directory: Path = Path()) -> Path:
    """Return the file that ``name`` means: one in ``directory``, or else a ready configuration's."""
    path = directory / Path(name).expanduser()
    return READY_CONFIGS.get(str(name), path) if not path.exists() else path


def read_settings(path: Path) -> Settings:
    """Return the settings in a YAML file, of which every key names a field. Raises ConfigError."""
    is_name = path.suffix not in (".yaml", ".yml") and path == Path(path.name)
    near = did_you_mean(path.name, dict.fromkeys(READY_CONFIGS)) if is_name else ""
    tree = read_yaml(path, "config", f"a YAML file, or one of {', '.join(READY_CONFIGS)}{near}")
    check_names(AsyPPOConfig, tree, f" in {path}")
    return listed(tree)


def listed(tree: Mapping[str, Any], prefix: str = "") -> Settings:
    """Return settings with a list wherever one name stands in place of a list of names."""
    known, result = by_path(AsyPPOConfig), dict(tree)
    for key, value in tree.items():
        field = known.get(f"{prefix}{key}")
        if field is not None and field.branch is not None and isinstance(value, Mapping):
            result[key] = listed(value, f"{prefix}{key}.")
        elif field is not None and field.is_list_of_names:
            result[key] = one_or_list(field.path, value)
    return result


def read_yaml(path: Path, name: str, needs: str) -> Any:
    """Return what a YAML file holds. Raises ConfigError, which says that ``name`` ``needs`` something else."""
    try:
        return yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"{name}: cannot read '{path}': {error.strerror}; needs {needs}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name}: {path} is no YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """YAML without dates: a ``run_name`` of 2026-01-31 is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def merged(base: Mapping[str, Any], change: Mapping[str, Any], prefix: str = "") -> Settings:
    """Return the settings of ``base`` with those of ``change`` laid over them; neither is altered. A branch keeps what
    ``change`` does not name; a setting that is a mapping or a list (``data.task.params``) is replaced as a whole."""
    known = by_path(AsyPPOConfig)
    result = dict(base)
    for key, value in change.items():
        path, below = f"{prefix}{key}", result.get(key)
        is_branch = path in known and known[path].branch is not None
        if is_branch and isinstance(below, Mapping) and isinstance(value, Mapping):
            result[key] = merged(below, value, f"{path}.")
        else:
            result[key] = value
    return result


def add_settings(parser: ArgumentParser) -> None:
    """Add every field of the configuration to a parser, which then checks the types of what it is given."""
    parser.add_class_arguments(AsyPPOConfig)


def configuration(values: Any) -> AsyPPOConfig:
    """Return the validated configuration among what such a parser has made of its input. Raises ConfigError."""
    config = AsyPPOConfig(**{field.name: values[field.name] for field in fields(AsyPPOConfig)})
    config.validate()
    return config


@cache
def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add_settings(parser)
    return parser


def _typed(tree: Settings) -> AsyPPOConfig:
    from jsonargparse import ArgumentError

    parser = _parser()
    try:
        values = parser.instantiate(parser.parse_object(copy.deepcopy(tree)))  # it alters what it parses
    except ArgumentError as error:
        raise ConfigError(in_one_line(str(error))) from error
    return configuration(values)


def in_one_line(message: str) -> str:
    """Return what jsonargparse says, in our words where it names a field and a value."""
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    values = re.findall(r"(?:Got|Given) value: (.*)", message)
    if keys and values:
        # Of a field below one that may be null both keys are named, the inner one relative to the outer.
        path = keys[0] if keys[-1].startswith(keys[0]) else f"{keys[0]}.{keys[-1]}"
        path = keys[-1] if len(keys) > 1 and keys[-1].startswith(keys[0]) else path
        outer, field = by_path(AsyPPOConfig).get(keys[0]), by_path(AsyPPOConfig).get(path)
        if outer is not None and outer.entry is not None:  # of an entry of a list, such as data.tasks
            field = by_path(outer.entry).get(keys[-1])
        if field is not None:
            return f"{path}: got {values[0]!r}, needs {field.values}"
    return f"{' '.join(message.split())}; see --help"
