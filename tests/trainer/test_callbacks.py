"""transformers' callbacks around the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from asyppo.checkpoint import checkpoints
from asyppo.loop import TrainingLoop
from asyppo.run.directory import read_jsonl

Make = Callable[..., Any]
EVENTS = ("train_begin", "step_begin", "step_end", "evaluate", "log", "save", "train_end")


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Much of a tiny run's time would be its report."""
    monkeypatch.setattr("asyppo.loop.report_at_the_end", lambda path: None)


def score(completions: list[str], **_: Any) -> list[float]:
    """Number of a's."""
    return [float(c.count("a")) for c in completions]


class Diary(TrainerCallback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, int]] = []
        self.told: list[dict[str, Any]] = []


def _note(event: str) -> Callable[..., None]:
    def note(self: Diary, args: Any, state: Any, control: Any, **told: Any) -> None:
        self.entries.append((event, state.global_step))
        self.told.append({"args": args, "state": state, **told})

    return note


for _event in EVENTS:
    setattr(Diary, f"on_{_event}", _note(_event))


def test_events_in_order(tiny_config: Make, tiny_trainer: Make) -> None:
    # In the background a checkpoint may be done after the next step has begun.
    config, diary = tiny_config(max_steps=3, save_steps=2, save_async=False, evaluation={"every": 2}), Diary()
    trainer = tiny_trainer(config, score, eval_dataset=[{"prompt": "ab"}], callbacks=[diary])
    run = trainer.train().run
    step_2 = [("step_begin", 1), ("step_end", 2), ("evaluate", 2), ("log", 2), ("save", 2)]
    assert diary.entries == [
        ("train_begin", 0),
        *[("evaluate", 0), ("log", 0)],
        *[("step_begin", 0), ("step_end", 1), ("log", 1)],
        *step_2,
        *[(event, step + 1) for event, step in step_2],
        ("train_end", 3),
    ]
    told = dict(zip(diary.entries, diary.told, strict=True))
    first = told["train_begin", 0]
    assert first["args"] is config
    assert first["model"] is trainer.policy.model
    assert first["processing_class"] is trainer.tokenizer
    assert first["optimizer"] is trainer.policy_optimizer
    rows = read_jsonl(run.metrics)
    of_evaluation = {k: v for k, v in rows[2].items() if k.startswith("eval/")}
    assert len(of_evaluation) > 1
    assert told["evaluate", 2]["metrics"] == of_evaluation
    assert told["log", 2]["logs"]["actor/entropy"] == rows[2]["actor/entropy"]
    state = told["train_end", 3]["state"]
    assert [row["step"] for row in state.log_history] == [0, 1, 2, 3]
    assert (state.max_steps, state.eval_steps, state.save_steps) == (3, 2, 2)


def test_a_callback_asks_for_things(tiny_config: Make, tiny_trainer: Make) -> None:
    class Asks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_evaluate = state.global_step == 2
            control.should_save = state.global_step == 3
            control.should_training_stop = state.global_step == 4
            return control

    config = tiny_config(max_steps=9, save_steps=1)
    result = tiny_trainer(config, score, eval_dataset=[{"prompt": "ab"}], callbacks=[Asks()]).train()
    rows = read_jsonl(result.run.metrics)
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [0, 2, 4]
    assert [path.name for path in checkpoints(result.run.path)] == ["checkpoint-3", "checkpoint-4"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert result.checkpoint.name == "checkpoint-4"
    assert result.stopped_by is None


def test_a_callback_cannot_change_what_is_written(tiny_config: Make, tiny_trainer: Make) -> None:
    class Clears(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            logs.clear()

    run = tiny_trainer(tiny_config(), score, callbacks=[Clears(), PrinterCallback()]).train().run
    assert "actor/entropy" in read_jsonl(run.metrics)[0]


def test_the_best_accuracy(
    tiny_config: Make, tiny_trainer: Make, scripted_evaluation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy, diary = [0.1, 0.3, 0.3, 0.2], Diary()
    config = tiny_config(max_steps=3, save_steps=1, evaluation={"every": 1})
    trainer = tiny_trainer(config, score, callbacks=[diary])
    monkeypatch.setattr(TrainingLoop, "evaluate", lambda self, run, step: scripted_evaluation(accuracy[step]))
    run = trainer.train().run
    state = diary.told[-1]["state"]
    assert (state.best_metric, state.best_global_step) == (0.3, 1)
    assert state.best_model_checkpoint == str(run.path / "checkpoint-1")


class Patience(TrainerCallback, ExportableState):
    """Stops at the third evaluation, whoever has seen the first ones."""

    def __init__(self) -> None:
        self.seen = 0

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen += 1
        control.should_training_stop = self.seen == 3

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"seen": self.seen}}


def test_a_callback_with_a_state_goes_on(tiny_config: Make, tiny_trainer: Make) -> None:
    def train(**fields: Any) -> Any:
        config = tiny_config(**({"max_steps": 9, "save_steps": 1, "evaluation": {"every": 2}} | fields))
        return tiny_trainer(config, score, eval_dataset=[{"prompt": "ab"}], callbacks=[Diary(), Patience()]).train()

    assert train(run_name="whole").checkpoint.name == "checkpoint-4"
    train(max_steps=3, evaluation={})
    assert train(resume=True).checkpoint.name == "checkpoint-4"
