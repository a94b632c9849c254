"""A family's way through the trainer: train, go on, evaluate."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyppo.cli.build import build_trainer, evaluate_model
from asyppo.cli.commands import find_model
from asyppo.config import load_config
from tests.families.makers import make

ROUTES = {"generate": "grpo", "continuous": "ppo"}
"""Algorithm by sampler: each of both is taken once."""
GAP = "sampling/sampling_logp_difference/mean"
TOLERANCE = 1e-4
"""Nats, in float32."""
PROMPTS = [
    *("1+2=", "what is 3+14=?", "9-4=", "sum of 5 and 7", "0", "a longer prompt than all of the others"),
    *("11+2=", "what is 3+4=?", "9-44=", "sum of 50 and 70", "7", "of two prompts the longer one"),
]

REWARD = '''
def digits(completions, **_):
    """The share of digits."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]
'''


@dataclass(frozen=True)
class Outcome:
    """What came of one way through."""

    gap: float | None = None
    """Nats by which log-probs of sampled tokens and the trainer's differ, the mean over tokens, of the worst step."""
    refusal: str = ""
    """The line with which it was refused."""
    fault: str = ""
    """What went wrong: a traceback's last line, or what does not agree."""

    def __str__(self) -> str:
        if self.fault:
            return f"**{self.fault}**"
        return f"refused: {self.refusal}" if self.refusal else f"{self.gap:.0e}"


def go(model: Path, algorithm: str, sampler: str) -> Outcome:
    """Train the model in ``model`` for a step, go on for another after a pause, and evaluate what came of it."""
    settings: dict[str, Any] = {
        "algorithm": algorithm,
        "sampler": sampler,
        "max_steps": 1,
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_completion_length": 6,
        "num_mini_batches": 1,
        "learning_rate": 1e-3,
        "log_completions": False,
        "report_to": [],
        "run_name": "run",
        "reward_funcs": ["reward.py:digits"],
        "policy": {"model_name_or_path": str(model)},
        "data": {"dataset_name": "rows.jsonl", "eval_size": 3},
        "eval": {"num_generations": 1},
    }
    with _workplace(model.parent / "work"):
        Path("reward.py").write_text(REWARD)
        Path("rows.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                for more in ({}, {"max_steps": 2, "resume": True}):
                    run = build_trainer(load_config(settings | more)).train().run
                config = load_config(settings)
                evaluated = evaluate_model(config, find_model(str(run.path))[0], Path("evaluated"))
        except Exception as error:
            line = str(error)
            if getattr(error, "exit_status", None) == 2 and "\n" not in line:
                return Outcome(refusal=line)
            return Outcome(fault=f"{type(error).__name__}: {' '.join(line.split())[:200]}")
        return _judged(run.rows(), evaluated.accuracy)


def _judged(rows: list[dict[str, Any]], accuracy: float) -> Outcome:
    """What the metrics say, and the accuracy of the last checkpoint."""
    steps, last = [row["step"] for row in rows], rows[-1]["eval/accuracy"]
    gaps = [row[GAP] for row in rows[1:]]
    skipped = any(value for row in rows for name, value in row.items() if name.endswith("skipped_updates"))
    if steps != [0, 1, 2]:
        return Outcome(fault=f"has the steps {steps}")
    if accuracy != last:
        return Outcome(fault=f"accuracy {last} in training, {accuracy} of its checkpoint")
    if skipped or None in gaps:
        return Outcome(fault="a loss or gradient is not finite")
    if max(gaps) > TOLERANCE:
        return Outcome(fault=f"samples from another distribution: {max(gaps):.2g} nats")
    return Outcome(gap=max(gaps))


def through(name: str, directory: Path) -> dict[str, Outcome]:
    """Return what came of each sampler of ``ROUTES``; where one is refused, of ``auto`` in its place, too."""
    model = directory / "model"
    make(name, model)
    outcomes = {}
    for sampler, algorithm in ROUTES.items():
        outcomes[sampler] = go(model, algorithm, sampler)
        if outcomes[sampler].refusal:
            outcomes[f"auto for {sampler}"] = go(model, algorithm, "auto")
    return outcomes


@contextlib.contextmanager
def _workplace(directory: Path) -> Iterator[None]:
    """A new current directory."""
    before = Path.cwd()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)
