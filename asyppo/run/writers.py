"""Where metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import importlib.util
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.run import durable


class Writer(Protocol):
    """Takes the metrics of a step."""

    name: str

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a row with its ``step``."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's directory."""

    name = "tensorboard"

    def __init__(self, config: AsyPPOConfig, directory: Path, after_step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder = directory / "tensorboard"
        # Points of later steps, of a run that is resumed, do not count any more. TensorBoard reads files in the order
        # of their names, which have the second they were made in: this one has to be another than the last file's.
        purge_step = after_step + 1 if folder.exists() else None
        while list(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.02)
        self.writer = SummaryWriter(folder, purge_step=purge_step)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write a scalar a metric; it is in the file on return."""
        for name, value in _numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class Tracker:
    """The module ``wandb`` or ``trackio``, which share the calls used here. A resumed run goes on under its name; of
    steps that it repeats the tracker keeps what it has, the same but for timings."""

    def __init__(self, name: str, config: AsyPPOConfig, directory: Path):
        self.name, self.module = name, importlib.import_module(name)
        options: dict[str, Any] = {"project": "asyppo", "name": directory.name, "config": asdict(config)}
        if name == "wandb":
            options |= {"id": _identity(directory), "dir": str(directory)}
        try:
            self.module.init(**options, resume="allow")
        except Exception as error:  # no account, no network, a version that knows no `resume`: each has its own
            raise ConfigError(f"report_to: {name} cannot start: {' '.join(str(error).split())}") from error

    def log(self, row: Mapping[str, Any]) -> None:
        """Send the metrics."""
        self.module.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        """Wait until everything is sent."""
        self.module.finish()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _identity(directory: Path) -> str:
    """Return the name by which the tracker knows the run, made once: a run directory's own name may be another's,
    too."""
    file = directory / ".tracker-id"
    if not file.exists():
        durable.write_text(file, secrets.token_hex(8))
    return file.read_text()


def check_writers(config: AsyPPOConfig) -> None:
    """Raise ConfigError if ``config.report_to`` names something that is not installed."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to: got {name!r}, which is not installed; needs `pip install {name}`")


def open_writers(config: AsyPPOConfig, directory: Path, after_step: int) -> list[Writer]:
    """Return the writers that ``config.report_to`` names. Raises ConfigError if one cannot start."""
    return [
        TensorBoard(config, directory, after_step) if name == "tensorboard" else Tracker(name, config, directory)
        for name in config.report_to
    ]
