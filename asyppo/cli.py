"""The command line: ``asyppo train``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.signals import exiting_at_once

RESUME = "Go on with the run named run_name from its last checkpoint; without such a run, start it."
DEFAULT_CONFIG = Path(str(files("asyppo") / "default.yaml"))


def parser() -> ArgumentParser:
    """Build the parser of ``asyppo``: fields, defaults and help come from the configuration's dataclasses."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    train = ArgumentParser(description="Train a policy.", exit_on_error=False)
    train.add_argument(
        "--config",
        action="config",
        help="YAML file; without one, the embedded default runs. Further options override it.",
    )
    train.add_class_arguments(AsyPPOConfig, skip={"resume"})
    train.add_argument("--resume", action="store_true", help=RESUME)  # a flag, where a field would want a value
    top = ArgumentParser(
        prog="asyppo",
        description="PPO with mini-critics for language models (AsyPPO).",
        exit_on_error=False,
        allow_abbrev=False,  # a mistyped name must not be taken for another
    )
    top.add_subcommands(required=True).add_subcommand("train", train)
    return top


def parse(argv: Sequence[str]) -> AsyPPOConfig:
    """Return the validated configuration of ``asyppo train …``. Raises ConfigError."""
    arguments = list(argv)
    if arguments[:1] == ["train"] and not any(a.split("=")[0] == "--config" for a in arguments):
        arguments[1:1] = ["--config", str(DEFAULT_CONFIG)]
    top = parser()
    try:
        namespace = top.instantiate(top.parse_args(arguments)).train
    except ArgumentError as error:
        raise ConfigError(f"{' '.join(str(error).split())}; see asyppo train --help") from error
    config = AsyPPOConfig(**{field.name: namespace[field.name] for field in fields(AsyPPOConfig)})
    config.validate()
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``asyppo`` and return its exit status: 0; 1 for a run that failed; 2 for a setting that cannot work; 130
    and 143 for one that SIGINT or SIGTERM ended, as a shell has it."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        with exiting_at_once():  # but for the loop, which ends its step first
            return train(config)
    except ConfigError as error:
        print(f"asyppo: error: {error}", file=sys.stderr)
        return 2


def train(config: AsyPPOConfig) -> int:
    """Train as configured, print what came of it, and return the exit status."""
    # Threads of torch's OpenMP pool that spin while they wait make small models crawl on a machine that is busy with
    # something else. It reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Here, since `asyppo --help` needs none of them and they take seconds.
    from transformers.utils import logging as transformers_logging

    from asyppo.build import build_trainer
    from asyppo.checkpoint import CheckpointError
    from asyppo.durable import WriteError
    from asyppo.rewards import RewardError
    from asyppo.trainer import TrainingError

    transformers_logging.disable_progress_bar()
    try:
        result = build_trainer(config).train()
    except (TrainingError, RewardError, CheckpointError, WriteError) as error:
        print(f"asyppo: error: {error}", file=sys.stderr)
        return 1
    if result.stopped_by is not None:
        path = result.run.path
        print(
            f"asyppo: stopped by {result.stopped_by.name}; to go on: asyppo train --config {path / 'config.yaml'} "
            f"--run_name {path.name} --resume",
            file=sys.stderr,
        )
        return 128 + result.stopped_by
    before, after = result.accuracy_before, result.accuracy_after
    if before is not None and after is not None:
        print(f"held-out accuracy: {before:.4f} -> {after:.4f}")
    run = result.run
    for name, path in (
        ("run", run.path),
        ("metrics", run.metrics),
        ("curves", run.path / "curves.png"),
        ("samples", run.samples),
        ("checkpoint", result.checkpoint),
    ):
        print(f"{name + ':':<12}{path}")
    gain = config.eval.min_gain
    if gain is not None and before is not None and after is not None and after - before < gain:
        print(
            f"asyppo: error: held-out accuracy rose by {after - before:.4f}, less than eval.min_gain = {gain}",
            file=sys.stderr,
        )
        return 1
    return 0
