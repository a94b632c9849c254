"""``asyppo audit``: from arguments to an audit of a checkpoint, and its results to a file, the terminal and the
report."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from asyppo.audit import audit_gradients, audit_values
from asyppo.audit.batches import Split
from asyppo.audit.gradients import LEAST as LEAST_BATCHES
from asyppo.audit.values import LEAST as LEAST_STATES
from asyppo.checkpoint import checkpoints, trainer_state
from asyppo.cli.build import build_trainer, config_of_checkpoint, trainer_of_checkpoint, unnamed
from asyppo.config import AsyPPOConfig, ConfigError, load_config
from asyppo.config.files import Settings, merged, read_yaml
from asyppo.distributed.processes import is_main, processes
from asyppo.report import report_at_the_end
from asyppo.report.audits import gradient_tables, text_of, value_tables
from asyppo.run.directory import settings
from asyppo.run.durable import as_json, write_text
from asyppo.trainer import AsyPPOTrainer

USUAL: dict[str, dict[str, Any]] = {
    "critics": {
        "the run's": {},
        "λ 1": {"lam": 1.0},
        "λ 0.5": {"lam": 0.5},
        "λ 0": {"lam": 0.0},
        "no mask": {"advantage_mask_fraction": 0.0},
    },
    "without": {
        "grpo": {"algorithm": "grpo"},
        "rloo": {"algorithm": "rloo"},
    },
}
"""Arms where none are asked for: of a run with values, and of all."""
NEEDS_VALUES = ("advantage_values", "length_adaptive_alpha", "advantage_mask", "advantage_mask_skip")
"""Settings that an algorithm without values refuses, unless they are at their defaults."""


def audit(namespace: Namespace) -> int:
    """Run the command and return its exit status. Raises ConfigError."""
    checkpoint = find_checkpoint(namespace.run)
    step = int(trainer_state(checkpoint)["step"])
    kind = "gradients" if namespace.gradients else "audit"
    out = checkpoint.parent / f"{kind}-{step}.json" if namespace.out is None else Path(namespace.out).expanduser()
    split = _split(namespace.split)
    if not namespace.gradients and (namespace.arm or namespace.arms):
        raise ConfigError("--arm: got one, needs --gradients: values have no arms")
    config = config_of_checkpoint(checkpoint, nested(namespace.set, "--set"))
    if config.environment.given:
        raise ConfigError(
            f"environment: got {config.environment.name or 'tools'}, needs none for an audit, which goes on from "
            "states of responses: an environment's cannot be gone back to"
        )
    with processes(config.distributed):
        trainer = trainer_of_checkpoint(checkpoint, config)
        head = {"kind": kind, "step": step, "checkpoint": str(checkpoint.resolve().name)}
        if namespace.gradients:
            stopped_by, enough, found = _gradients(trainer, namespace, split)
        else:
            stopped_by, enough, found = _values(trainer, namespace, split, step)
    status = 0 if stopped_by is None else 128 + stopped_by
    if not is_main():
        return status
    if not enough:
        print("asyppo: stopped before there was anything to show", file=sys.stderr)
        return status
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(as_json(head | found), ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"--out: cannot write {str(out)!r}: {error.strerror}") from error
    print(text_of((gradient_tables if namespace.gradients else value_tables)(as_json(found["results"]))))
    print(f"\nresults: {out}")
    if namespace.out is None and (report := report_at_the_end(checkpoint.parent)) is not None:
        print(f"report:  {report}")
    return status


def _values(
    trainer: AsyPPOTrainer, namespace: Namespace, split: Split | None, step: int
) -> tuple[int | None, bool, dict[str, Any]]:
    found = audit_values(
        trainer,
        states=namespace.states,
        continuations=namespace.continuations,
        prompts=namespace.prompts,
        split=split,
        fit=namespace.fit,
        seed=namespace.seed,
        budget=namespace.budget,
    )
    if len(found.states) < LEAST_STATES:
        return found.stopped_by, False, {}
    written = {"settings": found.settings, "results": found.results(), "samples": found.samples(trainer, step)}
    return found.stopped_by, True, written


def _gradients(
    trainer: AsyPPOTrainer, namespace: Namespace, split: Split | None
) -> tuple[int | None, bool, dict[str, Any]]:
    config = trainer.config
    arms = {name: arm_of(config, name, change) for name, change in changes_of(config, namespace).items()}
    found = audit_gradients(
        trainer,
        arms,
        lambda config: build_trainer(unnamed(config)),
        batches=namespace.batches,
        reference_batches=namespace.reference_batches,
        critic_steps=namespace.critic_steps,
        split=split or "train",
        seed=namespace.seed,
    )
    if min(len(g) for g in (*found.arms.values(), *found.references.values())) < LEAST_BATCHES:
        return found.stopped_by, False, {}
    return found.stopped_by, True, {"settings": found.settings, "results": found.results()}


def find_checkpoint(name: str) -> Path:
    """Return the checkpoint that ``name`` means: one, or the last of a run's directory. Raises ConfigError."""
    path = Path(name).expanduser()
    if (path / "trainer_state.json").is_file():
        return path
    found = checkpoints(path) if path.is_dir() else []
    if not found:
        raise ConfigError(f"audit: got {name!r}, needs the directory of a run that has a checkpoint, or a checkpoint")
    return found[-1]


def changes_of(config: AsyPPOConfig, namespace: Namespace) -> dict[str, Settings]:
    """Return the arms that are asked for, or some usual ones, as changes of the run's settings by name."""
    arms: dict[str, Settings] = {}
    if namespace.arms is not None:
        content = read_yaml(Path(namespace.arms).expanduser(), "--arms", "a YAML file with arms")
        given = content.get("arms") if isinstance(content, dict) else None
        if not isinstance(given, dict) or not all(isinstance(change, dict | None) for change in given.values()):
            raise ConfigError(f"--arms: got {given!r} under arms, needs a mapping from names to settings")
        arms |= {str(name): undotted(change or {}) for name, change in given.items()}
    for text in namespace.arm:
        before, colon, after = text.partition(":")
        named = bool(colon) and "=" not in before
        arms[before.strip() if named else text.strip()] = nested(after if named else text, "--arm")
    if arms:
        return arms
    values = config.num_critics > 0 or config.monte_carlo_values
    return {name: dict(change) for part in USUAL if values or part == "without" for name, change in USUAL[part].items()}


def arm_of(config: AsyPPOConfig, name: str, change: Settings) -> AsyPPOConfig:
    """Return the run's settings with an arm's ``change``. Where that takes another algorithm without values, what only
    those with values take has its default. Raises ConfigError."""
    try:
        made = merged(settings(config), change)
        plain = load_config({"algorithm": made["algorithm"]})
        if not plain.num_critics and not plain.monte_carlo_values:
            kept = [key for key in NEEDS_VALUES if hasattr(plain, key) and key not in change]
            made |= {key: getattr(plain, key) for key in kept}
        return load_config(made)
    except ConfigError as error:
        raise ConfigError(f"--arm {name}: {error}") from error


def nested(text: str, option: str) -> Settings:
    """Return the settings in ``key=value key=value``, keys dotted, values in YAML. Raises ConfigError."""
    pairs: dict[str, Any] = {}
    for part in shlex.split(text):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"{option}: got {part!r}, needs settings as key=value")
        pairs[key] = yaml.safe_load(value)
    return undotted(pairs)


def undotted(tree: Mapping[str, Any]) -> Settings:
    """Return settings of which some keys are dotted, such as ``critic.num_critics``, as a tree."""
    made: Settings = {}
    for key, value in tree.items():
        first, dot, rest = str(key).partition(".")
        below = undotted({rest: value}) if dot else undotted(value) if isinstance(value, dict) else value
        both = isinstance(made.get(first), dict) and isinstance(below, dict)
        made[first] = merged(made[first], below) if both else below
    return made


def _split(name: str | None) -> Split | None:
    names: tuple[Split, ...] = ("eval", "train")
    if name is None or name in names:
        return next((known for known in names if known == name), None)
    raise ConfigError(f"--split: got {name!r}, needs eval or train")
