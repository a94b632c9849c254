"""A run's directory, and the display of its progress."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asyppo.cli.main import parse
from asyppo.config import ConfigError
from asyppo.run.directory import RunDirectory, read_jsonl
from asyppo.run.progress import ProgressDisplay, Timer

Make = Callable[..., Any]

# Section by section: verl's names, then ours.
NAMES = {
    "step",
    "actor/entropy",
    "actor/pg_loss",
    "actor/pg_clipfrac",
    "actor/pg_clipfrac_lower",
    "actor/ppo_kl",
    "actor/grad_norm",
    "actor/lr",
    "actor/skipped_updates",
    "critic/vf_loss",
    "critic/vf_explained_var",
    "critic/score/mean",
    "critic/advantages/mean",
    "critic/returns/mean",
    "critic/values/mean",
    "response_length/mean",
    "response_length/clip_ratio",
    "timing_s/gen",
    "timing_s/reward",
    "timing_s/update_critic",
    "timing_s/values",
    "timing_s/adv",
    "timing_s/update_actor",
    "timing_s/step",
    "perf/throughput",
    "critic/std/mean",
    "critic/std/low",
    "critic/std/high",
    "actor/adv_mask_frac",
    "actor/entropy_keep_frac",
    "critic/0/vf_loss",
    "critic/1/vf_loss",
}


def score(completions: list[str], **_: Any) -> list[float]:
    """Number of a's."""
    return [float(c.count("a")) for c in completions]


def test_what_a_run_writes(tiny_config: Make, tiny_trainer: Make, capsys: pytest.CaptureFixture) -> None:
    config = tiny_config(max_steps=4, save_steps=3, logging_samples=2, evaluation={"every": 2, "num_generations": 3})
    held_out = [{"prompt": "ab"}, {"prompt": "cd"}]
    result = tiny_trainer(config, score, eval_dataset=held_out).train()
    run = result.run.path
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "tensorboard",
        ".lock",
        "checkpoint-3",
        "checkpoint-4",
    }
    assert result.checkpoint == run / "checkpoint-4"

    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    for row in rows[1:]:
        assert not NAMES - row.keys()
        # Explained variance is null where all returns are equal.
        assert all(isinstance(row[key], (int, float)) for key in row if key != "critic/vf_explained_var")
    assert ["eval/accuracy" in row for row in rows] == [True, False, True, False, True]
    assert ["timing_s/save_checkpoint" in row for row in rows] == [False, False, False, True, True]
    assert (rows[0]["eval/accuracy"], rows[-1]["eval/accuracy"]) == (result.accuracy_before, result.accuracy_after)
    phases = ("gen", "reward", "update_critic", "values", "adv", "update_actor")
    for row in rows[1:]:
        assert sum(row[f"timing_s/{phase}"] for phase in phases) <= row["timing_s/step"]

    samples = read_jsonl(run / "samples.jsonl")
    assert [(s["step"], s["split"]) for s in samples] == (
        [(0, "eval")] * 6
        + [(1, "train")] * 2
        + [(2, "train")] * 2
        + [(2, "eval")] * 6
        + [(3, "train")] * 2
        + [(4, "train")] * 2
        + [(4, "eval")] * 6
    )
    for sample in samples:
        assert sample["reward"] == sample["completion"].count("a")
    assert [s["prompt"] for s in samples[:6]] == ["ab"] * 3 + ["cd"] * 3
    right = sum(s["reward"] >= 1 for s in samples[-6:]) / 6
    assert result.accuracy_after == pytest.approx(right)

    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == [f"step {i}/4" for i in (1, 2, 3, 4)]
    assert f"held-out accuracy {right:.3f}" in lines[-1]


def test_without_an_evaluation_at_the_start(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config(max_steps=2, evaluation={"on_start": False, "num_generations": 1})
    result = tiny_trainer(config, score, eval_dataset=[{"prompt": "ab"}]).train()
    rows = read_jsonl(result.run.path / "metrics.jsonl")
    assert [(row["step"], "eval/accuracy" in row) for row in rows] == [(1, False), (2, True)]
    assert result.accuracy_before is None
    assert result.accuracy_after == rows[-1]["eval/accuracy"]
    with pytest.raises(ConfigError, match=r"eval\.min_gain: got 0\.2, needs eval\.on_start"):
        tiny_config(evaluation={"on_start": False, "min_gain": 0.2}).validate()


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_names_of_the_baselines(tiny_config: Make, tiny_trainer: Make, algorithm: Any) -> None:
    config = tiny_config(algorithm=algorithm)
    row = tiny_trainer(config, score).step(1).metrics
    missing = {"critic/1/vf_loss"} if algorithm == "ppo" else set()
    if algorithm == "grpo":
        missing = {name for name in NAMES if "vf_loss" in name} | {"timing_s/update_critic", "timing_s/values"}
    assert NAMES - row.keys() == missing
    assert row["actor/adv_mask_frac"] == 0  # no disagreement, nothing masked
    assert row["actor/entropy_keep_frac"] == 1


def test_config_yaml_makes_the_same_configuration(tiny_config: Make) -> None:
    config = parse(["train", "--learning_rate", "3e-7", "--eval.min_gain", "null", "--data.prompt_suffix", "\n= "])
    config.output_dir, config.resume, config.run_name = tiny_config().output_dir, True, "run"
    run = RunDirectory(config)
    assert parse(["train", "--config", str(run.path / "config.yaml"), "--resume"]) == config
    assert parse(["train", "--config", str(run.path / "config.yaml")]) == replace(config, resume=False)
    assert parse(["train", f"--config={run.path / 'config.yaml'}", "--seed", "5"]).seed == 5


def test_runs_have_names_of_their_own(tiny_config: Make) -> None:
    config = tiny_config(run_name=None)
    assert len({RunDirectory(config).path for _ in range(5)}) == 5
    config = tiny_config(run_name="taken")
    RunDirectory(config)
    with pytest.raises(ConfigError, match=r"run_name: .*taken exists"):
        RunDirectory(config)


def test_a_directory_that_cannot_be_made(tiny_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir: cannot make"):
        RunDirectory(tiny_config(output_dir=str(tmp_path / "file" / "runs")))


def test_json_stays_json(tiny_config: Make) -> None:
    run = RunDirectory(tiny_config())
    run.log_metrics({"step": 1, "a": math.nan, "b": math.inf, "c": 0.5})
    run.log_samples([{"completion": 'é "\n\u2028', "reward": 1.0, "extra": {"x": [math.nan, (math.inf, "NaN")]}}])
    assert run.metrics.read_text().count("\n") == 1
    assert json.loads(run.metrics.read_text()) == {"step": 1, "a": None, "b": None, "c": 0.5}
    extra = {"x": [None, [None, "NaN"]]}
    assert read_jsonl(run.samples) == [{"completion": 'é "\n\u2028', "reward": 1.0, "extra": extra}]


def test_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0])
    monkeypatch.setattr(Timer, "clock", staticmethod(lambda: next(ticks)))
    timer = Timer(torch.device("cpu"))
    with timer.phase("step"):
        with timer.phase("gen"):
            pass
        with timer.phase("gen"):
            pass
    assert timer.seconds == {"timing_s/gen": 2.5, "timing_s/step": 10.0}


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 10.0, 30.0, 50.0, 70.0, 100.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    stream = io.StringIO()
    with ProgressDisplay("step", 5, every=2, stream=stream) as progress:
        for i in range(5):
            progress.advance(f"note {i}")
    assert stream.getvalue().splitlines() == [
        "step 2/5  0:30 elapsed, 0:45 left  note 1",
        "step 4/5  1:10 elapsed, 0:17 left  note 3",
        "step 5/5  1:40 elapsed, 0:00 left  note 4",
    ]


def test_progress_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with ProgressDisplay("step", 3, stream=stream) as progress:
        for i in range(3):
            progress.advance(f"note {i}")
    assert "3/3" in stream.getvalue()
    assert "note 2" in stream.getvalue()


def test_progress_that_was_taken_back() -> None:
    stream = io.StringIO()
    with ProgressDisplay("step", 10, done=4, every=2, stream=stream) as progress:
        for count in (-3, 2, 1, 2):  # 1, 3, 4, 6
            progress.advance(count=count)
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == ["step 3/10", "step 4/10", "step 6/10"]
