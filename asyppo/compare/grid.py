"""What is compared: arms, each a change of one base configuration, and the seeds each is run with.

::

    config: default            # base of every arm: a configuration's name or file
    seeds: [0, 1, 2, 3, 4]
    reference: grpo            # the arm that the others are compared with, seed by seed
    set: {max_steps: 80}       # changes that every arm has
    arms:
      grpo: {algorithm: grpo}
      two critics: {critic: {num_critics: 2}}
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from asyppo.config import AsyPPOConfig, ConfigError

Settings = dict[str, Any]
"""A configuration as a YAML file holds it: nested dictionaries."""

KEYS = {"config", "seeds", "reference", "set", "arms"}
WHOLE = {"params", "columns", "chat_template_kwargs"}  # settings that are a mapping: replaced, as by a second --config


@dataclass(frozen=True)
class Run:
    """One cell of the grid."""

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return f"{re.sub(r'[^a-z0-9.]+', '-', self.arm.lower()).strip('-')}-{self.seed}"


@dataclass(frozen=True)
class Grid:
    """Arms by name, each with all its settings but the seed; seeds; the arm others are compared with."""

    arms: dict[str, Settings]
    seeds: list[int]
    reference: str

    @property
    def runs(self) -> list[Run]:
        """Every cell, seed by seed, so that an unfinished grid has all arms of its first seeds."""
        return [Run(arm, seed) for seed in self.seeds for arm in self.arms]


def load_grid(path: Path) -> Grid:
    """Read a grid from a YAML file. Raises ConfigError."""
    content = read_settings(path)
    if unknown := set(content) - KEYS:
        raise ConfigError(f"{path}: got the key {min(unknown)!r}, needs {', '.join(sorted(KEYS))}")
    arms, seeds = content.get("arms"), content.get("seeds")
    if not isinstance(arms, dict) or not arms or not all(isinstance(a, dict | None) for a in arms.values()):
        raise ConfigError(f"arms: got {arms!r}, needs a mapping from names to settings")
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int for s in seeds):
        raise ConfigError(f"seeds: got {seeds!r}, needs a list of integers")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: got {seeds}, needs different ones")
    reference = content.get("reference", next(iter(arms)))
    if reference not in arms:
        raise ConfigError(f"reference: got {reference!r}, needs one of the arms: {', '.join(arms)}")
    base = read_settings(_config_path(content.get("config", "default"), path.parent))
    common = merged(base, content.get("set") or {})
    grid = Grid({str(name): merged(common, change or {}) for name, change in arms.items()}, seeds, str(reference))
    for name, settings in grid.arms.items():
        _check(name, settings)
    names = [run.name for run in grid.runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"arms: got {', '.join(arms)}, needs names that differ in letters and digits")
    return grid


def _config_path(name: str, beside: Path) -> Path:
    from asyppo.cli.main import READY_CONFIGS

    return READY_CONFIGS[name] if name in READY_CONFIGS else beside / name


def _check(arm: str, settings: Settings) -> None:
    """Raise ConfigError if ``asyppo train`` would refuse the settings, before hours have gone into other arms."""
    try:
        parsed(settings)
    except ConfigError as error:
        raise ConfigError(f"arms: {arm}: {error}") from error


def parsed(settings: Settings) -> AsyPPOConfig:
    """Return the configuration that ``asyppo train`` makes of a file with ``settings``. Raises ConfigError."""
    from asyppo.cli.main import parse

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "arm.yaml"
        file.write_text(yaml.safe_dump(settings))
        try:
            return parse(["train", "--config", str(file)])
        except ConfigError as error:
            raise ConfigError(str(error).replace(f" in {file}", "")) from error


def read_settings(path: Path) -> Settings:
    """Return a YAML file's mapping. Raises ConfigError."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot read it: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got {type(content).__name__}, needs a YAML mapping")
    return content


def merged(base: Settings, change: Settings) -> Settings:
    """Return ``base`` with the entries of ``change``, groups of settings within it likewise; neither is altered."""
    result = dict(base)
    for key, value in change.items():
        inner = result.get(key)
        if isinstance(value, dict) and isinstance(inner, dict) and key not in WHOLE:
            result[key] = merged(inner, value)
        else:
            result[key] = value
    return result
