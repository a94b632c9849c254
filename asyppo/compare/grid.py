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
from dataclasses import dataclass
from pathlib import Path

from asyppo.config import AsyPPOConfig, ConfigError, load_config
from asyppo.config.files import Settings, config_file, merged, read_settings, read_yaml

KEYS = {"config", "seeds", "reference", "set", "arms"}


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

    def steps(self, arm: str) -> int:
        """Steps of a run of an arm."""
        return self.arms[arm].get("max_steps", AsyPPOConfig.max_steps)

    @property
    def runs(self) -> list[Run]:
        """Every cell, seed by seed, so that an unfinished grid has all arms of its first seeds."""
        return [Run(arm, seed) for seed in self.seeds for arm in self.arms]


def load_grid(path: Path) -> Grid:
    """Read a grid from a YAML file. Raises ConfigError."""
    content = read_yaml(path, "grid", "a YAML file of arms and seeds")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got {type(content).__name__}, needs a YAML mapping")
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
    base = read_settings(config_file(content.get("config", "default"), path.parent))
    common = merged(base, content.get("set") or {})
    grid = Grid({str(name): merged(common, change or {}) for name, change in arms.items()}, seeds, str(reference))
    for name, settings in grid.arms.items():
        _check(name, settings)
    names = [run.name for run in grid.runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"arms: got {', '.join(arms)}, needs names that differ in letters and digits")
    return grid


def _check(arm: str, settings: Settings) -> None:
    """Raise ConfigError if ``asyppo train`` would refuse the settings, before hours have gone into other arms."""
    try:
        load_config(settings)
    except ConfigError as error:
        raise ConfigError(f"arms: {arm}: {error}") from error
