"""Callbacks: those of transformers, and so of TRL, around AsyPPO's loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from asyppo.config import AsyPPOConfig
from asyppo.distributed.processes import from_main, local_rank, rank


class Callbacks:
    """Calls every callback at an event, with the configuration as ``args`` and the models among the keywords.

    ``on_train_begin``, then in each step ``on_step_begin``, ``on_step_end``, ``on_evaluate`` (with ``metrics``) where
    there is an evaluation, ``on_log`` (with ``logs``, the step's row) and ``on_save`` where there is a checkpoint;
    ``on_train_end``. ``control.should_evaluate``, ``should_save`` and ``should_training_stop`` are what the loop goes
    by: it sets them before ``on_step_end``, which may change them.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback], config: AsyPPOConfig, **shared: Any):
        self.callbacks, self.config, self.shared = list(callbacks), config, shared
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=config.max_steps, logging_steps=1, eval_steps=config.eval.every, save_steps=config.save_steps
        )
        self.state.is_world_process_zero = rank() == 0
        self.state.is_local_process_zero = local_rank() == 0

    def __call__(self, event: str, **arguments: Any) -> None:
        """Call the method ``event`` of every callback; what one returns is the control from then on."""
        for callback in self.callbacks:
            method = getattr(callback, event)
            self.control = method(self.config, self.state, self.control, **self.shared, **arguments) or self.control

    def resume(self, step: int, rows: list[dict[str, Any]], states: dict[str, Any]) -> None:
        """Put the state back to the end of ``step``, given the rows of metrics and ``state_dict`` of then."""
        self.state.global_step, self.state.log_history = step, rows
        for row in rows:
            self._compare(row["step"], row.get("eval/accuracy"))
        for index, callback in enumerate(self.callbacks):
            for name, value in states.get(_key(index, callback), {}).items():
                setattr(callback, name, value)

    def begin_step(self) -> None:
        """Reset what holds for one step, and call ``on_step_begin``."""
        self.control.should_evaluate = self.control.should_save = False
        self("on_step_begin")

    def end_step(self, step: int) -> None:
        """Decide what the configuration says is due after ``step``, and call ``on_step_end``."""
        every, save_steps = self.config.eval.every, self.config.save_steps
        self.state.global_step = step
        self.control.should_training_stop |= step == self.config.max_steps
        self.control.should_evaluate |= every > 0 and step % every == 0
        self.control.should_save |= save_steps > 0 and step % save_steps == 0
        self("on_step_end")
        self.control = from_main(lambda: self.control)  # what the callbacks of rank 0 decide

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Remember the best accuracy, and call ``on_evaluate``."""
        self._compare(step, metrics["eval/accuracy"])
        self("on_evaluate", metrics=dict(metrics))

    def log(self, row: dict[str, float]) -> None:
        """Add a row to the history, and call ``on_log``."""
        self.state.log_history.append(dict(row))
        self("on_log", logs=dict(row))

    def saved(self, checkpoint: Path) -> None:
        """Call ``on_save``, with the checkpoint's step as ``state.global_step``: it may have been written in the
        background of later ones."""
        now, self.state.global_step = self.state.global_step, int(checkpoint.name.rpartition("-")[2])
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(checkpoint)
        self("on_save")
        self.state.global_step = now

    def _compare(self, step: int, accuracy: float | None) -> None:
        if accuracy is not None and (self.state.best_metric is None or accuracy > self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = accuracy, step

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the callbacks that have one (transformers' ExportableState), as JSON can hold it."""
        return {
            _key(index, callback): callback.state()["attributes"]
            for index, callback in enumerate(self.callbacks)
            if isinstance(callback, ExportableState)
        }


def _key(index: int, callback: TrainerCallback) -> str:
    return f"{index}:{type(callback).__name__}"
