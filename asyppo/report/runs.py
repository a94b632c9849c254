"""What a run wrote, read so that a run which is still going, an older one or a damaged one can be looked at, too."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from asyppo.config import ConfigError

NUMBERS = (
    "logprob",
    "sampler_logprob",
    "entropy",
    "log_ratio",
    "value",
    "std",
    "advantage",
    "raw_advantage",
    "returns",
)
"""Per-token numbers of ``samples.jsonl``; those of each critic, ``values``, come on top."""
AUDITED = ("truth", "truth_se")
"""Per-token numbers of the responses in ``audit-STEP.json``."""
FLAGS = ("advantage_keep", "entropy_keep")
"""Per-token truth values of ``samples.jsonl``."""
UNSET = "–"
"""Stands for a setting that a run's configuration does not have."""
READ_BYTES = 200_000_000
"""Of a longer ``samples.jsonl``, evenly spaced lines that come to about so much are read."""


@dataclass
class Sample:
    """One response. ``columns`` holds float32 [n] arrays, NaN where a number is missing."""

    step: int
    split: str
    prompt: str
    completion: str
    reward: float
    rewards: dict[str, float]
    truncated: bool
    group: int | None
    tokens: list[str] | None
    """None where the run did not write them."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Those of ``NUMBERS`` that are there, and ``value_0``, ``value_1``, … for the critics."""
    flags: dict[str, np.ndarray] = field(default_factory=dict)
    """Those of ``FLAGS`` that are there, bool [n]."""
    policy: np.ndarray | None = None
    """bool [n]: the tokens that are the policy's, where an environment wrote others, which have no numbers; but for
    ``value`` and ``returns`` of the first of an answer, which are of the state after the policy's turn. None: all."""
    turns: list[dict[str, Any]] = field(default_factory=list)
    """With an environment, its turns."""

    @property
    def length(self) -> int | None:
        """The policy's tokens; None where none were written."""
        return None if self.tokens is None else len(self.tokens) if self.policy is None else int(self.policy.sum())

    @property
    def critics(self) -> int:
        """How many critics have values here."""
        return sum(name.startswith("value_") for name in self.columns)


@dataclass
class Run:
    """A run's directory, read."""

    path: Path
    name: str
    config: dict[str, Any]
    config_text: str
    metrics: list[dict[str, float | None]]
    """One row a step, in order of steps; the last one written where a step was done twice."""
    samples: list[Sample]
    samples_written: int
    """Lines of ``samples.jsonl``, of which ``samples`` may hold a part."""
    notes: list[str]
    """What is missing or unreadable, as sentences."""
    audits: list[dict[str, Any]] = field(default_factory=list)
    """What ``asyppo audit`` wrote, in order of steps."""

    @property
    def algorithm(self) -> str:
        """The algorithm, or a question mark."""
        return str(self.config.get("algorithm", "?"))

    @property
    def last_step(self) -> int:
        """The last step that has metrics; 0 for none."""
        return int(self.metrics[-1]["step"] or 0) if self.metrics else 0

    @property
    def trained(self) -> list[Sample]:
        """Responses of training whose tokens were written."""
        return [s for s in self.samples if s.split == "train" and s.tokens]

    @property
    def has_critics(self) -> bool:
        """Whether critics judged the responses."""
        return any(s.critics for s in self.samples) or any("critic/vf_loss" in row for row in self.metrics)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which the metric ``name`` is a finite number, and the numbers."""
        rows = [(row["step"], row.get(name)) for row in self.metrics]
        points = [(int(step or 0), value) for step, value in rows if value is not None and math.isfinite(value)]
        return [step for step, _ in points], [value for _, value in points]


def read_run(path: Path) -> Run:
    """Read a run's directory. Raises ConfigError for a path that is none."""
    if not path.is_dir():
        raise ConfigError(f"report: got {str(path)!r}, which is no directory, needs a run's directory")
    if not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "samples.jsonl")):
        raise ConfigError(
            f"report: got {str(path)!r}, which has no config.yaml, metrics.jsonl or samples.jsonl, "
            "needs a run's directory"
        )
    notes: list[str] = []
    config, text = _read_config(path / "config.yaml", notes)
    metrics = _read_metrics(path / "metrics.jsonl", notes)
    samples, written = _read_samples(path / "samples.jsonl", notes)
    audits = _read_audits(path, notes)
    samples += [_sample(row) for audit in audits for row in audit.get("samples", [])]
    run = Run(path, path.resolve().name, config, text, metrics, samples, written, notes, audits)
    _say_what_is_missing(run)
    return run


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run in legends: its own, its path where two are equal, and two settings that differ."""
    names = [run.name for run in runs]
    names = [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]
    # A setting that one of them does not know tells versions apart, not runs.
    telling = [(key, values) for key, values in differences(runs).items() if UNSET not in values][:2]
    settings = [", ".join(f"{key.split('.')[-1]} {values[i]}" for key, values in telling) for i in range(len(runs))]
    return [f"{name} ({setting})" if setting else name for name, setting in zip(names, settings, strict=True)]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings in which the runs differ, each with its value in every run, as text."""
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = {key: [str(settings.get(key, UNSET)) for settings in flat] for key in keys}
    return {key: row for key, row in rows.items() if key not in ("run_name", "output_dir") and len(set(row)) > 1}


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_config(path: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    if not path.exists():
        notes.append("config.yaml is missing: settings are unknown.")
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        notes.append(f"config.yaml cannot be read ({' '.join(str(error).split())}): settings are unknown.")
        return {}, text
    if not isinstance(config, dict):
        notes.append("config.yaml holds no settings.")
        return {}, text
    return config, text


def _read_metrics(path: Path, notes: list[str]) -> list[dict[str, float | None]]:
    if not path.exists():
        notes.append("metrics.jsonl is missing: there are no curves.")
        return []
    rows: dict[int, dict[str, float | None]] = {}
    with open(path, "rb") as file:
        lines = [line for line in file if line.strip()]
    for row in _objects(lines, path.name, notes):
        numbers = {key: value for key, value in row.items() if value is None or _is_number(value)}
        rows[row["step"]] = rows.get(row["step"], {}) | numbers
    if not rows:
        notes.append("metrics.jsonl has no rows yet: there are no curves.")
    return [rows[step] for step in sorted(rows)]


def _read_samples(path: Path, notes: list[str]) -> tuple[list[Sample], int]:
    if not path.exists():
        notes.append("samples.jsonl is missing: there are no responses, distributions or calibration.")
        return [], 0
    places, offset = [], 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                places.append((offset, len(line)))
            offset += len(line)
        every = math.ceil(offset / READ_BYTES)
        chosen = places
        if every > 1:
            # The last line goes with the rest so that a half-written one is known as such.
            chosen = places[:-1:every] + places[-1:]
            notes.append(
                f"samples.jsonl is {offset / 1e6:,.1f} MB long: {len(chosen):,} of its {len(places):,} lines were "
                "read, evenly spaced."
            )
        samples = [_sample(row) for row in _objects((_line(file, *place) for place in chosen), path.name, notes)]
    if not samples:
        notes.append("samples.jsonl has no rows yet: there are no responses, distributions or calibration.")
    return samples, len(places)


def _read_audits(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    audits = []
    for file in (*path.glob("audit-*.json"), *path.glob("gradients-*.json")):
        try:
            audit = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(audit, dict) or not isinstance(audit["step"], int) or "results" not in audit:
                raise ValueError("holds no results")
        except (OSError, ValueError, KeyError) as error:
            notes.append(f"{file.name} cannot be read ({' '.join(str(error).split())}) and is left out.")
            continue
        audits.append(audit)
    return sorted(audits, key=lambda audit: (audit.get("kind", ""), audit["step"]))


def _line(file: Any, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _objects(lines: Any, name: str, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines that are JSON objects with a step. A half-written last line is what a run that goes on leaves."""
    unreadable, last_is_whole = 0, True
    for line in lines:
        row: Any = None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            last_is_whole = line.endswith(b"\n")
        if isinstance(row, dict) and isinstance(row.get("step"), int) and not isinstance(row["step"], bool):
            yield row
        else:
            unreadable += 1
    if not last_is_whole:
        unreadable -= 1
        notes.append(f"The last line of {name} is half written and left out: the run may still be going.")
    if unreadable:
        notes.append(f"{unreadable:,} lines of {name} cannot be read and are left out.")


def _sample(row: dict[str, Any]) -> Sample:
    tokens = row.get("tokens")
    tokens = [str(token) for token in tokens] if isinstance(tokens, list) else None
    rewards = row.get("rewards")
    sample = Sample(
        step=row["step"],
        split=str(row.get("split", "train")),
        prompt=str(row.get("prompt", "")),
        completion=str(row.get("completion", "")),
        reward=_number(row.get("reward")),
        rewards={str(k): _number(v) for k, v in rewards.items()} if isinstance(rewards, dict) else {},
        truncated=row.get("truncated") is True,
        group=row["group"] if isinstance(row.get("group"), int) else None,
        tokens=tokens,
    )
    if tokens is None:
        return sample
    columns = {name: row.get(name) for name in (*NUMBERS, *AUDITED, *FLAGS)}
    values = row.get("values")
    columns |= {f"value_{m}": column for m, column in enumerate(values if isinstance(values, list) else [])}
    for name, column in columns.items():
        if not isinstance(column, list) or len(column) != len(tokens):
            continue
        if name in FLAGS:
            sample.flags[name] = np.array([value is not False for value in column], dtype=bool)
        else:
            sample.columns[name] = np.array([_number(value) for value in column], dtype=np.float32)
    policy = row.get("policy_tokens")
    if isinstance(policy, list) and len(policy) == len(tokens):
        sample.policy = np.array([own is not False for own in policy], dtype=bool)
        after = ~sample.policy & np.concatenate([[False], sample.policy[:-1]])
        for name, numbers in sample.columns.items():
            states = after if name.startswith("value") or name == "returns" else False
            numbers[~(sample.policy | states)] = math.nan
    turns = row.get("turns")
    sample.turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return sample


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan


def _is_number(value: Any) -> bool:
    # An integer may be longer than a float can hold.
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 60)


def _say_what_is_missing(run: Run) -> None:
    """Add notes on parts that the page cannot show."""
    steps = run.config.get("max_steps")
    if isinstance(steps, int) and run.last_step < steps:
        run.notes.append(f"{run.last_step} of {steps} steps are done: the run is still going, or was stopped.")
    trained = [s for s in run.samples if s.split == "train"]
    if run.samples and not trained:
        run.notes.append("samples.jsonl has no responses of training.")
    elif trained and not run.trained:
        run.notes.append("samples.jsonl has no tokens, as in runs of older versions: the token view shows text only.")
    elif trained:
        names = [*NUMBERS, *FLAGS]
        missing = [n for n in names if not any(n in s.columns or n in s.flags for s in run.trained)]
        if missing:
            run.notes.append(f"samples.jsonl has no {', '.join(missing)}.")
