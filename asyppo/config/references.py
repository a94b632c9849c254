"""What a setting names: a built-in thing, or ``module:name`` or ``path.py:name`` of one's own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from asyppo.config.errors import ConfigError

T = TypeVar("T")


def resolve(setting: str, name: str, built_in: Mapping[str, T], accept: Callable[[Any], bool] = callable) -> T | Any:
    """Return what ``setting`` means by ``name``: an entry of ``built_in``, or what ``load`` finds.

    ``accept`` says whether a thing that was found will do. Raises ConfigError.
    """
    if name in built_in:
        return built_in[name]
    if ":" not in name:
        raise ConfigError(
            f"{setting}: got {name!r}, needs one of {', '.join(built_in)}, or one of your own as module:function or "
            "path.py:function"
        )
    return load(setting, name, accept)


OF_A_FILE = "_reward_file_"  # begins the names of modules that were loaded by their file's path


def check_parameters(setting: str, name: str, function: Callable[..., Any], *parameters: str) -> None:
    """Raise ConfigError unless ``function``, which ``setting`` names, can be called with these positional arguments."""
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        got = f"({', '.join(inspect.signature(function).parameters)})"
        raise ConfigError(
            f"{setting}: {name} takes {got}, needs to be called with ({', '.join(parameters)})"
        ) from error


def load(setting: str, reference: str, accept: Callable[[Any], bool] = callable) -> Any:
    """Return the function or object that ``module:name`` or ``path.py:name`` names. Raises ConfigError, which names the
    ``setting``.

    Modules are looked for in the working directory, too, and a file's neighbours can be imported by it.
    """
    place, _, name = reference.rpartition(":")
    try:
        module = _load_file(Path(place).expanduser()) if place.endswith(".py") else _load_module(place)
    except FileNotFoundError as error:
        raise ConfigError(f"{setting}: got {reference!r}, but {error}") from error
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        where = "; ".join(f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-1:])
        raise ConfigError(
            f"{setting}: got {reference!r}, whose import failed: {type(error).__name__}: {in_one_line(error)} ({where})"
        ) from error
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not accept(found):
        made_here = [
            key
            for key, value in vars(module).items()
            if key[0] != "_" and (inspect.isfunction(value) or getattr(value, "__module__", None) == module.__name__)
        ]
        raise ConfigError(
            f"{setting}: got {reference!r}, but {place} has no function {name!r}; "
            f"it has {', '.join(key for key in made_here if accept(getattr(module, key))) or 'none'}"
        )
    return found


def _load_module(name: str) -> ModuleType:
    _importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise FileNotFoundError(f"there is no module {error.name!r}") from error
        raise


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path.absolute()}")
    path = path.resolve()
    name = f"{OF_A_FILE}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    _importable(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _importable(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.append(str(directory))  # behind everything, so that it shadows nothing


def in_one_line(error: BaseException) -> str:
    """Return the message of ``error`` without line breaks."""
    return " ".join(str(error).split())
