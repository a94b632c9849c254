"""The loop around the steps: evaluation, checkpoints, callbacks, signals, and going on where a run stopped."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from asyppo.checkpoint import (
    BackgroundWriter,
    Trained,
    checkpoints,
    last_valid_checkpoint,
    load_checkpoint,
    publish_checkpoint,
    take_checkpoint,
    trainer_state,
)
from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.data.rows import Rows
from asyppo.data.schedule import PROMPT_ORDER
from asyppo.distributed.processes import first_of_ranks, from_main, is_main, rank
from asyppo.evaluate import Evaluation, evaluate
from asyppo.metrics.introduction import introduction
from asyppo.metrics.samples import completions_table
from asyppo.metrics.step import summary
from asyppo.models.critics import Critics
from asyppo.models.policy import Policy
from asyppo.report import report_at_the_end
from asyppo.rewards.function import RewardFunction
from asyppo.rollout.collecting import Rollout
from asyppo.rollout.samplers import AGREES, EngineError, Sampler, SentWeights, agreement, settle, tolerance
from asyppo.run.callbacks import Callbacks
from asyppo.run.directory import RunDirectory, open_run
from asyppo.run.durable import WriteError
from asyppo.run.progress import ProgressDisplay, say
from asyppo.run.rng import seed_everything
from asyppo.run.signals import StopSignals

log = logging.getLogger("asyppo")


class TrainingError(RuntimeError):
    """Training cannot go on. A checkpoint has been saved; the message names it."""

    exit_status = 1


@dataclass
class TrainResult:
    """What a run came to."""

    run: RunDirectory
    checkpoint: Path
    accuracy_before: float | None
    accuracy_after: float | None
    stopped_by: signal.Signals | None = None
    """The signal that ended it before ``max_steps``."""


@dataclass(frozen=True)
class StepResult:
    """What a step came to. Nothing of it has been written yet."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    """Rows of ``samples.jsonl``."""

    @property
    def skipped(self) -> bool:
        """Whether an update of it was left out, since its loss or gradient was not finite."""
        return any(self.metrics.get(f"{of}/skipped_updates", 0) for of in ("actor", "critic"))


class Trainer(Protocol):
    """What the loop runs."""

    config: AsyPPOConfig
    policy: Policy
    critics: Critics | None
    tokenizer: PreTrainedTokenizerBase
    train_dataset: Rows
    eval_dataset: Rows
    reward_funcs: Sequence[RewardFunction]
    sampler: Sampler
    """What is called to sample."""
    engine: Sampler
    """What it calls in the end."""
    sampler_agrees: bool
    """Whether its log-probs have been seen to be the policy's."""
    rollout: Rollout
    callbacks: Sequence[TrainerCallback]
    policy_optimizer: Any

    @property
    def policy_warmup(self) -> int:
        """First steps, in which the policy stays as it is."""
        ...

    def step(self, step: int) -> StepResult:
        """Do one step, counted from 1."""
        ...

    def trained(self) -> Trained:
        """Return what a checkpoint saves beside the loop's own few numbers, by name."""
        ...

    def weights_changed(self) -> None:
        """Take note that the policy's weights are others now."""
        ...


def trial_prompts(trainer: Trainer) -> list[Tensor]:
    """Return prompts to try the sampler on, int64 [length] each."""
    rows = [trainer.train_dataset[i] for i in range(min(32, len(trainer.train_dataset)))]
    return trainer.rollout.tokenize([row["prompt"] for row in rows])


class TrainingLoop:
    """Runs the steps of a ``trainer``. What they learn is the trainer's; what is kept of them, and when, is here."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.config = trainer, trainer.config
        self.skipped_in_a_row = 0
        """Steps up to the last one whose loss or gradient was not finite."""
        self.strayed_in_a_row = 0
        """Steps up to the last one whose responses were not sampled from the policy."""
        self.writer = BackgroundWriter()
        self.checked_after: int | None = None
        """The last step after which the sampler was checked."""

    def train(self) -> TrainResult:
        """Run until ``max_steps``, with ``config.resume`` from the run's last checkpoint on, and return what came of
        it.

        SIGINT and SIGTERM end it after the step, with a checkpoint. Raises ConfigError where the sampler does not
        sample from the policy, and TrainingError when that, or a loss or gradient that is not finite, comes up in
        ``max_skipped_steps`` steps in a row, or the sampler's engine fails, after saving a checkpoint, and when
        something cannot be written.
        """
        trainer = self.trainer
        gap = settle(trainer.sampler, trainer.engine, trainer.policy, trial_prompts(trainer), self.config)
        trainer.sampler_agrees = gap <= AGREES
        hooks = Callbacks(
            self.trainer.callbacks,
            self.config,
            model=self.trainer.policy.model,
            processing_class=self.trainer.tokenizer,
            optimizer=self.trainer.policy_optimizer,
        )
        self.trainer.rollout.trainer_state = hooks.state
        with open_run(self.config) as run:
            try:
                return self._train(run, hooks)
            except WriteError as error:
                saved = checkpoints(run.path)
                last = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
                raise TrainingError(f"{error}; {last}") from error
            finally:
                self.writer.close()

    def _train(self, run: RunDirectory, hooks: Callbacks) -> TrainResult:
        config = self.config
        first, checkpoint = self.resume(run, hooks)
        self.introduce(run, first)
        hooks("on_train_begin")
        begins = first == 1 and not hooks.state.log_history
        if begins and config.eval.on_start and (evaluation := self.evaluate(run, step=0)) is not None:
            hooks.evaluated(0, evaluation.metrics())
            hooks.log(row := {"step": 0, **evaluation.metrics()})
            run.log_metrics(row)
        received = None
        with StopSignals() as signals, ProgressDisplay("step", config.max_steps, done=first - 1) as progress:
            for step in range(first, config.max_steps + 1):
                hooks.begin_step()
                try:
                    result = self.trainer.step(step)
                except EngineError as error:  # before it has learned anything
                    raise self._without_engine(error, run, step - 1, checkpoint, hooks) from error
                run.log_samples(result.samples)
                self.show_completions(step, result, progress)
                row = result.metrics
                self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
                gap = row["sampling/sampling_logp_difference/mean"]
                self.trainer.sampler_agrees = gap <= AGREES
                hooks.end_step(step)
                try:
                    # Responses of an earlier policy are not meant to agree with this one.
                    strayed = not row.get("sampling/age") and self._strayed(step, gap)
                    strayed |= self._checked(step)
                    if hooks.control.should_evaluate or hooks.control.should_training_stop:
                        start = time.perf_counter()
                        if (evaluation := self.evaluate(run, step)) is not None:
                            row |= {**evaluation.metrics(), "timing_s/eval": time.perf_counter() - start}
                            hooks.evaluated(step, evaluation.metrics())
                except EngineError as error:
                    hooks.log(row)
                    raise self._without_engine(error, run, step, None, hooks, row) from error
                self.strayed_in_a_row = self.strayed_in_a_row + 1 if strayed else 0
                hooks.log(row)
                failed = self._failure(step) is not None
                received = first_of_ranks(signals.received)
                stop = hooks.control.should_training_stop or failed or received is not None
                if stop or hooks.control.should_save:
                    checkpoint = self.save(run, step, row, hooks, wait=stop)
                else:
                    run.log_metrics(row)
                    self.finish_saving(hooks, wait=False)
                progress.advance(summary(row))
                if stop:
                    break
        hooks("on_train_end")
        if rank() == 0:
            report_at_the_end(run.path)
        if (failure := self._failure(hooks.state.global_step)) is not None:
            raise TrainingError(failure.format(checkpoint=checkpoint))
        assert checkpoint is not None  # the last step saved one
        accuracies = [row["eval/accuracy"] for row in hooks.state.log_history if "eval/accuracy" in row]
        before, after = (accuracies[0], accuracies[-1]) if accuracies else (None, None)
        if not config.eval.on_start:
            before = None
        unfinished = hooks.state.global_step < config.max_steps
        return TrainResult(run, checkpoint, before, after, received if unfinished else None)

    def introduce(self, run: RunDirectory, first: int) -> None:
        """Say what the run sets out with."""
        trainer = self.trainer
        again = f", which goes on after step {first - 1}" if first > 1 else ""
        say(
            f"run:        {run.path}{again}",
            *introduction(self.config, trainer.policy, trainer.critics, trainer.train_dataset, trainer.eval_dataset),
        )

    def show_completions(self, step: int, result: StepResult, progress: ProgressDisplay) -> None:
        """Print some of the samples of ``step``, where that is due."""
        config = self.config
        due = step == 1 or step % config.log_completions_steps == 0
        if config.log_completions and due and result.samples:
            progress.show(completions_table(result.samples[: config.num_completions_to_print]))

    def _failure(self, step: int) -> str | None:
        """Say why training cannot go on after ``step``; None where it can. What it leaves open is ``checkpoint``."""
        limit = self.config.max_skipped_steps
        if self.skipped_in_a_row >= limit:
            return (
                f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient, the last of them step "
                f"{step}; weights of before are in {{checkpoint}}. A lower learning rate may help."
            )
        if self.strayed_in_a_row >= limit:
            return (
                f"{self.strayed_in_a_row} steps in a row had responses that were not sampled from the policy, the last "
                f"of them step {step}; its weights are in {{checkpoint}}. Another sampler may help, or, where this is "
                "rounding, a larger sampling_logp_tolerance."
            )
        return None

    def _without_engine(
        self,
        error: EngineError,
        run: RunDirectory,
        step: int,
        saved: Path | None,
        hooks: Callbacks,
        row: dict[str, float] | None = None,
    ) -> TrainingError:
        """Save what was learned up to ``step``, unless ``saved`` is that checkpoint, and return the error to raise."""
        self.finish_saving(hooks)
        if step == 0:
            return TrainingError(f"{error}; nothing has been learned yet")
        if saved is None or saved.name != f"checkpoint-{step}":
            saved = self.save(run, step, row, hooks)
        return TrainingError(f"{error}; the run is saved up to step {step}, in {saved}, and goes on with --resume")

    def _checked(self, step: int) -> bool:
        """Let the sampler show that it samples from the policy as it is after ``step``, where that is due, and return
        whether it does not."""
        every, trainer = self.config.sampling_check_steps, self.trainer
        first = isinstance(trainer.sampler, SentWeights) and step == trainer.policy_warmup + 1
        if not first and (every == 0 or step % every):
            return False
        self.checked_after = step
        return self._strayed(step, *agreement(trainer.sampler, trainer.policy, trial_prompts(trainer), self.config))

    def _strayed(self, step: int, gap: float, rounding: float | None = None) -> bool:
        """Return whether log-probs of sampler and policy are further apart than they may be, and warn if they are."""
        limit = tolerance(self.config, self.trainer.policy, rounding)
        if gap <= limit:
            return False
        if is_main():
            log.warning(
                "step %d: log-probs of the sampler and of the policy differ by %.3g nats in the mean, more than %g: "
                "the responses were not sampled from the policy",
                step,
                gap,
                limit,
            )
        return True

    def resume(self, run: RunDirectory, hooks: Callbacks) -> tuple[int, Path | None]:
        """Put everything back to the run's last checkpoint, and cut off what was logged after it. Returns the step to
        go on with, and the checkpoint; 1 and None where there is none."""
        state: dict[str, Any] = {"step": 0, "skipped_in_a_row": 0, "strayed_in_a_row": 0, "callbacks": {}}
        checkpoint = from_main(lambda: last_valid_checkpoint(run.path))
        self.trainer.rollout.ahead = None
        seed_everything(self.config.seed * 1_000_003)
        if checkpoint is not None:
            self._check_data(trainer_state(checkpoint), checkpoint)
            state = load_checkpoint(checkpoint, self.trainer.trained())
            self.trainer.weights_changed()
        self.skipped_in_a_row = state["skipped_in_a_row"]
        # Checkpoints of older versions have neither.
        self.strayed_in_a_row = state.get("strayed_in_a_row", 0)
        self.trainer.sampler_agrees = state.get("sampler_agrees", self.trainer.sampler_agrees)
        run.start(state["step"])
        hooks.resume(state["step"], from_main(run.rows), state["callbacks"])
        return state["step"] + 1, checkpoint

    def evaluate(self, run: RunDirectory, step: int) -> Evaluation | None:
        """Evaluate on the held-out prompts and log the samples; None if there are no such prompts."""
        trainer, rows = self.trainer, self.trainer.eval_dataset
        if not rows:
            return None
        # An engine may not have taken the weights.
        if isinstance(trainer.sampler, SentWeights) and step != self.checked_after:
            self._strayed(step, *agreement(trainer.sampler, trainer.policy, trial_prompts(trainer), self.config))
        prompts = trainer.rollout.tokenize([row["prompt"] for row in rows])
        count = len(rows) * self.config.eval.num_generations
        # While steps are shown, an evaluation is a part of its step.
        display = ProgressDisplay("evaluate", count, seconds=math.inf if step else 5.0)
        with display:
            evaluation = evaluate(
                trainer.sampler,
                trainer.tokenizer,
                rows,
                prompts,
                trainer.reward_funcs,
                self.config,
                progress=lambda count: display.advance(count=count),
                trainer_state=trainer.rollout.trainer_state,
                playing=trainer.rollout.playing,
            )
        run.log_samples([{"step": step, "split": "eval", **sample} for sample in evaluation.samples])
        return evaluation

    def finish_saving(self, hooks: Callbacks | None = None, *, wait: bool = True) -> None:
        """Tell callbacks of a checkpoint that has been written; ``wait`` for it. Raises WriteError."""
        checkpoint = self.writer.finished(wait=wait)
        if checkpoint is not None and hooks is not None:
            hooks.saved(checkpoint)

    def save(
        self,
        run: RunDirectory,
        step: int,
        row: dict[str, float] | None = None,
        hooks: Callbacks | None = None,
        *,
        wait: bool = True,
    ) -> Path:
        """Save a checkpoint of policy, critics and optimizers, and log ``row``, the step's metrics. With ``save_async``
        and nobody to ``wait``, it is written in the background, and the path is where it will be.

        Whatever lies before a checkpoint is in the logs: it gets its name once the row is on the disk.
        """
        start = time.perf_counter()
        self.finish_saving(hooks)
        copied = self.config.save_async and not wait
        remembered = {
            "skipped_in_a_row": self.skipped_in_a_row,
            "strayed_in_a_row": self.strayed_in_a_row,
            "sampler_agrees": self.trainer.sampler_agrees,
            "accuracy": (row or {}).get("eval/accuracy"),
            "callbacks": {} if hooks is None else hooks.state_dict(),
            "data": {name: rows.digest for name, rows in self._data().items()},
            "prompt_order": PROMPT_ORDER,
        }
        trainer = self.trainer
        write = take_checkpoint(
            run.path,
            step,
            trainer.policy,
            trainer.critics,
            trainer.tokenizer,
            trainer.trained(),
            remembered,
            self.config.save_dtype,
            copied=copied,
        )
        partial = None if copied else write()
        if row is not None:
            row["timing_s/save_checkpoint"] = time.perf_counter() - start
            run.log_metrics(row)
        run.flush()
        if partial is None:
            self.writer.start(write, self.config.save_total_limit)
            return run.path / f"checkpoint-{step}"
        checkpoint = publish_checkpoint(partial, self.config.save_total_limit)
        if hooks is not None:
            hooks.saved(checkpoint)
        return checkpoint

    def _data(self) -> dict[str, Rows]:
        return {"train_dataset": self.trainer.train_dataset, "eval_dataset": self.trainer.eval_dataset}

    def _check_data(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        if state.get("prompt_order") != PROMPT_ORDER:
            raise ConfigError(
                f"resume: {checkpoint} is of an asyppo that drew prompts in another order; going on would train on "
                f"some of them twice and on others never; needs that version, or a new run, which can start from "
                f"{checkpoint / 'policy'}"
            )
        for field, rows in self._data().items():
            if rows.digest != state["data"][field]:
                raise ConfigError(
                    f"resume: {field}: the rows of {rows.name} are not those that the run began with, needs the same; "
                    "other rows need a new run"
                )
