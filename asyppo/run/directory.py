"""A run's directory: its settings, and what is written to it while the run goes on."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from asyppo.config import AsyPPOConfig, ConfigError, WarmStartConfig
from asyppo.config.fields import may_change, renamed, stands_in
from asyppo.distributed.processes import from_main
from asyppo.run import durable
from asyppo.run.writers import Writer, check_writers, open_writers


def run_path(config: AsyPPOConfig) -> Path:
    """Return where a run will write. Raises ConfigError if it cannot: its name is taken, the directory is read-only, or
    the run to resume had other settings."""
    if config.resume and config.run_name is None:
        raise ConfigError("run_name: got None, needs the name of the run that --resume goes on with")
    algorithm = config.algorithm.rpartition(":")[2]  # of one's own, the name alone
    name = config.run_name or f"{algorithm}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    path = Path(config.output_dir).expanduser() / name
    if path.exists() and not config.resume:
        raise ConfigError(f"run_name: {path} exists, needs a new name, or --resume to go on with that run")
    if (path / "config.yaml").exists():
        _check_settings(config, path / "config.yaml")
    elif path.is_dir() and any(not file.name.startswith(".") for file in path.iterdir()):
        raise ConfigError(f"run_name: {path} has no config.yaml, needs the directory of a run for --resume")
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise ConfigError(f"output_dir: cannot make {path}: {nearest} is no directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir: cannot write to {nearest}, needs a directory with write permission")
    return path


def _check_settings(config: AsyPPOConfig, file: Path) -> None:
    """Raise ConfigError if ``config`` differs from the settings in ``file`` in more than a resumed run may change: how
    long it runs, what it writes, where it runs, and how it fits in memory, as the settings' fields declare."""
    try:
        stored = flatten(yaml.safe_load(file.read_text()))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise ConfigError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error
    new_name, may = renamed(AsyPPOConfig), may_change(AsyPPOConfig)
    stored = {new_name.get(key, key): value for key, value in stored.items()}
    # A setting that is newer than the run had its default then, in a branch that may be absent, too.
    warm_start = WarmStartConfig() if any(key.startswith("warm_start.") for key in stored) else None
    now, default = flatten(settings(config)), flatten(settings(AsyPPOConfig(warm_start=warm_start)))
    if stored.get("critic.policy_inputs"):  # their projection was at the rate of the rest before it had one
        default["critic.policy_inputs_lr_ratio"] = 1.0
    stored = {key: value for key, value in default.items() if key in now} | stored
    fixed = [key for key in {**stored, **now} if not stands_in(key, may)]
    different = [key for key in fixed if stored.get(key) != now.get(key)]
    if different:
        got = ", ".join(f"{key} is {stored.get(key)!r} there, got {now.get(key)!r}" for key in different)
        raise ConfigError(f"resume: other settings than in {file}: {got}; --resume may change {', '.join(may)}")


def settings(config: AsyPPOConfig) -> dict[str, Any]:
    """Return what ``config.yaml`` holds: every setting, but not whether the run was resumed."""
    return {key: value for key, value in asdict(config).items() if key != "resume"}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a tree of settings by their path, such as ``critic.learning_rate``."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


class RunDirectory:
    """``config.yaml``, ``metrics.jsonl`` and ``samples.jsonl`` of one run; the report, TensorBoard's files and
    checkpoints lie beside them. A context manager: leaving it closes what is open.

    With ``config.resume`` it is the existing directory, if there is one. One process at a time may have it.
    """

    def __init__(self, config: AsyPPOConfig):
        check_writers(config)
        self.config, self.path = config, run_path(config)
        try:
            self.path.mkdir(parents=True, exist_ok=config.resume)
            self._lock = self._take()
            durable.sweep(self.path)
            durable.write_text(self.path / "config.yaml", yaml.safe_dump(settings(config), sort_keys=False))
        except OSError as error:
            raise ConfigError(f"output_dir: cannot write to {self.path}: {error.strerror}") from error
        self._writers: list[Writer] = []

    def _take(self) -> Any:
        """Lock the directory for as long as the process lives; its children do not inherit the lock."""
        file = open(self.path / ".lock", "w")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"run_name: {self.path} is being written by another process") from error
        return file

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One JSON object a sample; ``asyppo/metrics/samples.py`` says what it holds."""
        return self.path / "samples.jsonl"

    def start(self, step: int) -> None:
        """Be ready for what comes after ``step``: cut off what was written after it, half a line included, and start to
        report to TensorBoard and whatever else ``config.report_to`` names."""
        last = _cut_off(self.metrics, step)
        _cut_off(self.samples, last)
        self._writers = open_writers(self.config, self.path, last)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of ``metrics.jsonl``."""
        return read_jsonl(self.metrics) if self.metrics.exists() else []

    def log_metrics(self, row: Mapping[str, float]) -> None:
        """Append a row to ``metrics.jsonl``, and hand it to TensorBoard and the others. Raises WriteError."""
        _append(self.metrics, [row])
        for writer in self._writers:
            with durable.writing(self.path / writer.name):
                writer.log(row)

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        """Append rows to ``samples.jsonl``. Raises WriteError."""
        _append(self.samples, rows)

    def flush(self) -> None:
        """Wait until the rows are on the disk. Raises WriteError."""
        for path in (self.metrics, self.samples):
            if path.exists():
                with durable.writing(path):
                    durable.flush(path)

    def close(self) -> None:
        """Close what is open, and let other processes have the directory."""
        for writer in self._writers:
            writer.close()
        self._writers = []
        self._lock.close()


class RunOfMain(RunDirectory):
    """The directory of a run as the other ranks have it: rank 0 writes."""

    def __init__(self, config: AsyPPOConfig, path: Path):
        self.config, self.path = config, path

    def start(self, step: int) -> None:
        """Do nothing."""

    def log_metrics(self, row: Mapping[str, float]) -> None:
        """Do nothing."""

    def log_samples(self, rows: list[dict[str, Any]]) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def open_run(config: AsyPPOConfig) -> RunDirectory:
    """Return the directory of the run, which rank 0 makes. Raises ConfigError on every rank."""
    made: list[RunDirectory] = []

    def make() -> Path:
        made.append(RunDirectory(config))
        return made[0].path

    path = from_main(make)
    return made[0] if made else RunOfMain(config, path)


def _append(path: Path, rows: list[Any]) -> None:
    lines = list(durable.json_lines(rows))
    with durable.writing(path), open(path, "a") as file:
        file.writelines(lines)


def _cut_off(path: Path, step: int) -> int:
    """Cut a JSON-lines file off before its first row of a later step or half row. Return the last step left, or -1."""
    last, end = -1, 0
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                # Rows begin with their step: only that is read, since rows of samples are long.
                row = re.match(rb'\{"step": (\d+)[,}]', line)
                if row is None or int(row[1]) > step or not line.endswith(b"}\n"):
                    break
                last, end = int(row[1]), end + len(line)
        os.truncate(path, end)
    return last


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file."""
    with open(path) as file:
        return [json.loads(line) for line in file]
