"""TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asyppo.cli.build import build_trainer
from asyppo.config import ConfigError
from asyppo.run.directory import RunDirectory, read_jsonl

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Much of a tiny run's time would be its report."""
    monkeypatch.setattr("asyppo.loop.report_at_the_end", lambda path: None)


def score(completions: list[str], **_: Any) -> list[float]:
    """Number of a's."""
    return [float(c.count("a")) for c in completions]


class Tracker(ModuleType):
    """A module with the calls of wandb and trackio that keeps what it is told."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls: list[tuple[str, Any]] = []
        self.error: Exception | None = None

    def init(self, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("init", options))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.calls.append(("log", (step, metrics)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Tracker]:
    """Install a tracker under a name."""

    def install(name: str) -> Tracker:
        module = Tracker(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def test_tensorboard_has_what_metrics_has(tiny_config: Make, tiny_trainer: Make) -> None:
    config = tiny_config(max_steps=3, evaluation={"every": 2})
    run = tiny_trainer(config, score, eval_dataset=[{"prompt": "ab"}]).train().run
    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    points = {name: {p.step: p.value for p in board.Scalars(name)} for name in board.Tags()["scalars"]}
    rows = read_jsonl(run.metrics)
    assert set(points["eval/accuracy"]) == {0, 2, 3}
    assert points.keys() == {name for row in rows for name, value in row.items() if value is not None} - {"step"}
    for row in rows:
        for name, value in row.items():
            if name != "step" and value is not None:
                assert points[name][row["step"]] == pytest.approx(value, rel=1e-6)


def test_a_row_is_in_the_file_at_once(tiny_config: Make) -> None:
    with RunDirectory(tiny_config()) as run:
        run.start(0)
        run.log_metrics({"step": 1, "a": 0.5, "b": math.nan})
        board = EventAccumulator(str(run.path / "tensorboard")).Reload()
        assert [(p.step, p.value) for p in board.Scalars("a")] == [(1, 0.5)]
        assert board.Tags()["scalars"] == ["a"]


@pytest.mark.slow
def test_files_are_read_in_the_order_they_were_written_in(tiny_config: Make) -> None:
    for last in range(12):  # TensorBoard's own names of files made in one second are not in order after the tenth
        with RunDirectory(tiny_config(resume=True)) as run:
            run.start(last)
            run.log_metrics({"step": last + 1, "a": float(last)})
    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(p.step, p.value) for p in board.Scalars("a")] == [(i + 1, float(i)) for i in range(12)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers(tiny_config: Make, tiny_trainer: Make, tracker: Make, name: str) -> None:
    module = tracker(name)
    run = tiny_trainer(tiny_config(max_steps=2, report_to=[name]), score).train().run
    assert not (run.path / "tensorboard").exists()
    [(_, options), *logs, (last, _)] = module.calls
    assert (options["project"], options["name"], options["resume"]) == ("asyppo", "run", "allow")
    assert options["config"]["critic"]["num_critics"] == 2
    assert [step for _, (step, _) in logs] == [1, 2]
    rows = read_jsonl(run.metrics)
    for row, (_, (_, metrics)) in zip(rows, logs, strict=True):
        assert metrics == {key: value for key, value in row.items() if key != "step" and value is not None}
    assert last == "finish"
    # The same run at wandb after a resume, whatever else has its name.
    tiny_trainer(tiny_config(max_steps=3, report_to=[name], resume=True), score).train()
    again = [options for call, options in module.calls if call == "init"][1]
    assert again.get("id") == options.get("id")
    assert ("id" in options) is (name == "wandb")
    assert [step for call, entry in module.calls if call == "log" for step in entry[:1]] == [1, 2, 3]
    tiny_trainer(tiny_config(run_name="other", report_to=[name]), score).train()
    assert name != "wandb" or [o for call, o in module.calls if call == "init"][2]["id"] != options["id"]


def test_a_tracker_that_is_not_installed(
    tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else found(name))
    config = tiny_config(report_to=["tensorboard", "wandb"])
    message = "report_to: got 'wandb', which is not installed; needs `pip install wandb`"
    with pytest.raises(ConfigError, match=message):
        tiny_trainer(config, score).train()
    config.policy.model_name_or_path = "/no/such/model"
    with pytest.raises(ConfigError, match=message):
        build_trainer(config)  # before anything is loaded


def test_a_tracker_that_does_not_start(tiny_config: Make, tiny_trainer: Make, tracker: Make) -> None:
    tracker("wandb").error = PermissionError("no API key\nlog in first")
    with pytest.raises(ConfigError, match="report_to: wandb cannot start: no API key log in first"):
        tiny_trainer(tiny_config(report_to=["wandb"]), score).train()
