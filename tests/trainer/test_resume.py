"""A run that stops and goes on is the run that did not stop, bit for bit; signals; what a resumed run may change."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint import FileSystemReader
from transformers import TrainerCallback

from asyppo.config import AsyPPOConfig, ConfigError, MonteCarloConfig, SideConfig, WarmStartConfig
from asyppo.run.directory import RunDirectory, read_jsonl
from asyppo.trainer import TrainingError

Make = Callable[..., Any]
STEPS = 5


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a tiny run's time would be its report, and waiting for the disk."""
    monkeypatch.setattr("asyppo.loop.report_at_the_end", lambda path: None)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("asyppo.models.optimizers.SMALLEST", 64)  # of tensors with moments in 8 bits


class Stop(Exception):
    """Stands for whatever ends a process in the middle of a step."""


def score(completions: list[str], **_: Any) -> list[float]:
    """Share of a's."""
    return [c.count("a") / max(len(c), 1) for c in completions]


def noisy(completions: list[str], **_: Any) -> list[float]:
    """A reward that draws from every global generator."""
    return [c.count("a") + random.random() + float(np.random.rand()) + float(torch.rand(())) for c in completions]


class At(TrainerCallback):
    """Does something at the end of a step, before its checkpoint and its row are written."""

    def __init__(self, step: int, action: Callable[[], None]):
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Act."""
        if state.global_step == self.step:
            self.action()


def fail() -> None:
    """End the run."""
    raise Stop


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what depends on the clock."""
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in rows]


def written(run: Path) -> dict[str, Any]:
    """All that a run is to have in common with one that did not stop: logs, weights of the last checkpoint."""
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = [name for name in board.Tags()["scalars"] if not name.startswith(("timing_s/", "perf/"))]
    [*_, last] = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return {
        "metrics": without_clock(read_jsonl(run / "metrics.jsonl")),
        "samples": read_jsonl(run / "samples.jsonl"),
        "tensorboard": {name: [(point.step, point.value) for point in board.Scalars(name)] for name in names},
        "weights": {path.relative_to(last): path.read_bytes() for path in last.glob("*/*.safetensors")},
    }


@pytest.fixture
def run(tiny_config: Make, tiny_trainer: Make) -> Callable[..., Any]:
    """Train under a name, and return the result."""

    def train(
        name: str, callbacks: Any = (), reward: Any = score, trainer: dict[str, Any] | None = None, **fields: Any
    ) -> Any:
        config = tiny_config(
            **(
                {
                    "run_name": name,
                    "max_steps": STEPS,
                    "save_steps": 2,
                    "logging_samples": 3,
                    "evaluation": {"every": 2, "num_generations": 2},
                }
                | fields
            )
        )
        held_out = [{"prompt": "ab"}, {"prompt": "c"}]
        return tiny_trainer(config, reward, eval_dataset=held_out, callbacks=callbacks, **(trainer or {})).train()

    return train


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """Kept from one test to the next."""
    return {}


@pytest.fixture
def whole(run: Make, made: dict[str, Any]) -> dict[str, Any]:
    """What a run that nothing stops has written."""
    if not made:
        made.update(written(run("whole").run.path))
    return made


ALGORITHMS: dict[str, dict[str, Any]] = {
    "asyppo": {"beta": 0.1, "critic": {"policy_inputs": ["logprob", "entropy"]}},
    "ppo": {"algorithm": "ppo"},
    "grpo": {"algorithm": "grpo"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "warm-up": {"warmup_steps": 3, "critic": {"warmup_steps": 2}},
    "many updates": {
        "num_iterations": 2,
        "num_mini_batches": 2,
        "weight_decay": 0.1,
        "advantage_mask": "random",
        "critic": {"value_lambda": 0.9, "num_iterations": 2, "num_mini_batches": 2},
    },
    "random rewards": {"reward": noisy},
    "side critics": {"critic": {"kind": "side", "side": SideConfig(width=32)}},
    "moments in 8 bits": {"optim": "adamw_8bit", "num_mini_batches": 2},
    "continuations": {"algorithm": "vineppo", "monte_carlo": MonteCarloConfig(num_continuations=2, every=2)},
}


def stop_and_go_on(run: Make, stop: int, options: dict[str, Any]) -> dict[str, Any]:
    """End a run in a step, resume it, and return what is written."""
    with pytest.raises(Stop):
        run(f"stopped-{stop}", callbacks=[At(stop, fail)], **options)
    return written(run(f"stopped-{stop}", resume=True, **options).run.path)


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=ALGORITHMS)
def test_wherever_it_stops_it_goes_on_as_if_it_had_not(run: Make, options: dict[str, Any]) -> None:
    expected = written(run("whole", **options).run.path)
    assert [row["step"] for row in expected["metrics"]] == list(range(STEPS + 1))
    assert len({row["step"] for row in expected["samples"]}) == STEPS + 1
    for stop in (2, 3, STEPS) if options is ALGORITHMS["asyppo"] else (4,):  # the others: below
        assert stop_and_go_on(run, stop, options) == expected, stop


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whatever_has_a_state_goes_on(run: Make, options: dict[str, Any]) -> None:
    expected = written(run("whole", **options).run.path)
    for stop in (1, 3):
        assert stop_and_go_on(run, stop, options) == expected, stop


def test_it_may_stop_many_times(run: Make, whole: dict[str, Any]) -> None:
    """And the same command starts it and goes on, as a scheduler runs it again after a crash."""
    for stop in (1, 3, 4):
        with pytest.raises(Stop):
            run("stopped", callbacks=[At(stop, fail)], resume=True)
    result = run("stopped", resume=True)
    assert written(result.run.path) == whole
    again = run("stopped", resume=True)  # nothing is left to do
    assert written(again.run.path) == whole
    assert (again.checkpoint, again.accuracy_before, again.accuracy_after) == (
        result.checkpoint,
        result.accuracy_before,
        result.accuracy_after,
    )


def test_what_was_written_after_the_checkpoint_goes(run: Make, whole: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run("stopped", callbacks=[At(3, fail)])
    path = tmp_path / "runs" / "stopped"
    with open(path / "metrics.jsonl", "a") as metrics, open(path / "samples.jsonl", "a") as samples:
        metrics.write('{"step": 3, "actor/entropy": 9}\n{"step": 4, "actor/ent')
        samples.write('{"step": 3, "split": "tr')
    (path / ".checkpoint-4.partial" / "policy").mkdir(parents=True)
    (path / ".checkpoint-0.removed").mkdir()
    result = run("stopped", resume=True)
    assert written(result.run.path) == whole
    assert {file.name for file in path.iterdir() if file.name.startswith(".")} == {".lock"}


@pytest.mark.parametrize("logged", [True, False])
def test_the_evaluation_before_training_is_not_repeated(
    run: Make, whole: dict[str, Any], tmp_path: Path, logged: bool
) -> None:
    with pytest.raises(Stop):
        run("stopped", callbacks=[At(1, fail)])
    path, calls = tmp_path / "runs" / "stopped", []
    if not logged:  # as if it had been killed in the middle of it
        (path / "metrics.jsonl").write_text('{"step": 0, "eval/acc')
        (path / "samples.jsonl").write_text('{"step": 0, "split": "eval", "prompt": "ab", "completion": "a", "rew')

    class Counts(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            calls.append(state.global_step)

    assert written(run("stopped", callbacks=[Counts()], resume=True).run.path) == whole
    assert calls == ([] if logged else [0]) + [2, 4, 5]


def test_longer_than_it_was_to_be(run: Make, whole: dict[str, Any]) -> None:
    """The evaluation at the end of the first part is the one row that differs from a run of the whole length."""
    run("first", max_steps=3)
    rows = written(run("first", max_steps=STEPS, resume=True).run.path)["metrics"]
    assert "eval/accuracy" in rows[3]
    assert [r if i != 3 else None for i, r in enumerate(rows)] == [
        r if i != 3 else None for i, r in enumerate(whole["metrics"])
    ]


def test_steps_skipped_in_a_row_are_counted_on(run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyppo.trainer._clip_and_step", lambda model, optimizer, *_: optimizer.zero_grad())
    fields = {"save_steps": 1, "max_skipped_steps": 3}
    with pytest.raises(Stop):
        run("stopped", callbacks=[At(3, fail)], **fields)
    with pytest.raises(TrainingError, match=r"3 steps in a row .* step 3;"):
        run("stopped", resume=True, **fields)


def test_random_numbers_between_the_steps_go_on(run: Make) -> None:
    class Draws(TrainerCallback):
        def __init__(self) -> None:
            self.drawn: dict[int, Any] = {}

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.drawn[state.global_step] = (random.random(), float(np.random.rand()), float(torch.rand(())))

    whole, rest = Draws(), Draws()
    run("whole", callbacks=[whole])
    with pytest.raises(Stop):
        run("stopped", callbacks=[At(3, fail)])
    run("stopped", callbacks=[rest], resume=True)
    assert rest.drawn == {step: whole.drawn[step] for step in (2, 3, 4)}


# --- signals ---


@pytest.mark.parametrize(("number", "stops"), [(signal.SIGINT, (2,)), (signal.SIGTERM, (1, STEPS))])
def test_a_signal_ends_the_step_and_the_run(
    run: Make, whole: dict[str, Any], number: signal.Signals, stops: tuple[int, ...]
) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    for stop in stops:
        name = f"stopped-{stop}"
        result = run(name, callbacks=[At(stop, lambda: os.kill(os.getpid(), number))])
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
        assert result.checkpoint.name == f"checkpoint-{stop}"
        assert read_jsonl(result.run.metrics)[-1]["step"] == stop
        assert result.stopped_by == (number if stop < STEPS else None)
        assert written(run(name, resume=True).run.path) == whole


def test_a_second_signal_does_what_it_did_before(run: Make, tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run("stopped", callbacks=[At(3, twice)])
    path = tmp_path / "runs" / "stopped"
    assert read_jsonl(path / "metrics.jsonl")[-1]["step"] == 2
    assert [file.name for file in path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_ignored_stays_ignored(run: Make) -> None:
    """As under nohup, or in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = run("ignoring", callbacks=[At(1, lambda: os.kill(os.getpid(), signal.SIGINT))])
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.stopped_by, read_jsonl(result.run.metrics)[-1]["step"]) == (None, STEPS)


def test_training_off_the_main_thread(run: Make) -> None:
    """Only the main thread may set handlers."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run("thread", max_steps=1)))
    thread.start()
    thread.join()
    assert results[0].checkpoint.name == "checkpoint-1"


# --- what a resumed run may change ---


@pytest.fixture
def resumed(tiny_config: Make) -> Callable[..., RunDirectory]:
    """Open the run directory that a first configuration has made with another one."""
    RunDirectory(tiny_config()).close()

    def open_again(**changes: Any) -> RunDirectory:
        return RunDirectory(replace(tiny_config(), resume=True, **changes))

    return open_again


def test_settings_that_may_change(resumed: Make, tiny_config: Make) -> None:
    config = tiny_config()
    run = resumed(
        max_steps=9,
        save_steps=3,
        save_total_limit=2,
        report_to=[],
        max_tokens_per_micro_batch=7,
        eval=replace(config.eval, every=5),
        policy=replace(config.policy, attn_implementation="eager"),
    )
    assert "max_steps: 9" in (run.path / "config.yaml").read_text()


def test_settings_that_may_not_change(resumed: Make, tiny_config: Make) -> None:
    config = tiny_config()
    changes = {"learning_rate": 2e-2, "seed": 1, "optim": "adamw_8bit", "critic": replace(config.critic, num_critics=3)}
    with pytest.raises(ConfigError) as error:
        resumed(**changes, max_steps=9)
    text = str(error.value)
    assert text.startswith("resume: other settings than in ")
    for part in (
        "learning_rate is 0.01 there, got 0.02",
        "seed is 0 there, got 1",
        "optim is 'adamw' there, got 'adamw_8bit'",
        "critic.num_critics is 2 there, got 3",
    ):
        assert part in text
    assert "max_steps is" not in text
    assert "\n" not in text
    with pytest.raises(ConfigError, match=r"warm_start\.steps is None there, got 300"):
        resumed(warm_start=WarmStartConfig())


def test_a_setting_newer_than_the_run_had_its_default(resumed: Make, tiny_config: Make) -> None:
    file = Path(tiny_config().output_dir) / "run" / "config.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("beta:")))
    assert "beta" in resumed().config.__dict__
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("beta:")))
    with pytest.raises(ConfigError, match=r"beta is 0\.0 there, got 0\.5"):
        resumed(beta=0.5)


def test_critics_from_before_their_projection_had_a_rate_of_its_own(run: Make) -> None:
    inputs = {"policy_inputs": ["entropy"], "policy_inputs_lr_ratio": 1.0}
    few = {"evaluation": {"on_start": False, "every": 0}, "report_to": []}
    file = run("old", max_steps=1, critic=inputs, **few).run.path / "config.yaml"
    text = file.read_text()
    assert text.count("\n  policy_inputs_lr_ratio: 1.0\n") == 1
    file.write_text(text.replace("\n  policy_inputs_lr_ratio: 1.0\n", "\n"))
    with pytest.raises(ConfigError, match=r"critic\.policy_inputs_lr_ratio is 1\.0 there, got 30\.0"):
        run("old", max_steps=2, resume=True, critic={"policy_inputs": ["entropy"]}, **few)
    saved = FileSystemReader(file.parent / "checkpoint-1" / "state").read_metadata().state_dict_metadata
    assert not [key for key in saved if key.startswith("critics.optimizer.param_groups.1.")]  # as they were then
    run("old", max_steps=2, resume=True, critic=inputs, **few)


def test_so_had_one_of_a_branch_that_may_be_absent(tiny_config: Make) -> None:
    config = tiny_config(warm_start=WarmStartConfig(steps=5))
    RunDirectory(config).close()
    file = Path(config.output_dir) / "run" / "config.yaml"
    text = file.read_text()
    file.write_text("".join(line for line in text.splitlines(True) if not line.startswith("  wrong_rule:")))
    assert file.read_text() != text
    RunDirectory(replace(config, resume=True)).close()
    file.write_text("".join(line for line in text.splitlines(True) if not line.startswith("  wrong_rule:")))
    with pytest.raises(ConfigError, match=r"warm_start\.wrong_rule is 0\.0 there, got 0\.7"):
        RunDirectory(replace(config, resume=True, warm_start=WarmStartConfig(steps=5, wrong_rule=0.7)))


def test_a_setting_that_had_another_name_in_the_run(resumed: Make, tiny_config: Make) -> None:
    file = Path(tiny_config().output_dir) / "run" / "config.yaml"
    text = file.read_text()
    assert text.count("\n  lora_r: 0\n") == 1
    file.write_text(text.replace("\n  lora_r: 0\n", "\n  lora_rank: 0\n"))
    run = resumed()
    assert run.path.joinpath("config.yaml").read_text() == text.replace("resume: false", "resume: true")
    run.close()
    file.write_text(text.replace("\n  lora_r: 0\n", "\n  lora_rank: 4\n"))
    with pytest.raises(ConfigError, match=r"critic\.lora_r is 4 there, got 0"):
        resumed()


def test_other_rows_are_not_gone_on_with(run: Make, prompts: list[dict[str, Any]]) -> None:
    rows = [row | {"answer": str(i), "of": {("a", "tuple"): object()}} for i, row in enumerate(prompts)]
    run("run", max_steps=2, trainer={"train_dataset": rows})
    run("run", max_steps=3, resume=True, trainer={"train_dataset": [dict(row) for row in rows]})
    for others in (rows[::-1], rows[1:], [*rows[:-1], rows[-1] | {"answer": "8"}]):
        with pytest.raises(ConfigError, match=r"^resume: train_dataset: the rows of train_dataset are not those"):
            run("run", max_steps=4, resume=True, trainer={"train_dataset": others})


def test_names_of_runs(tiny_config: Make, tmp_path: Path) -> None:
    def error(**fields: Any) -> str:
        with pytest.raises(ConfigError) as raised:
            RunDirectory(AsyPPOConfig(output_dir=str(tmp_path), **fields))
        return str(raised.value)

    assert error(resume=True) == "run_name: got None, needs the name of the run that --resume goes on with"
    (tmp_path / "run").mkdir()
    assert (
        error(run_name="run")
        == f"run_name: {tmp_path}/run exists, needs a new name, or --resume to go on with that run"
    )
    RunDirectory(AsyPPOConfig(output_dir=str(tmp_path), run_name="run", resume=True))  # killed before it wrote anything
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert "other has no config.yaml" in error(run_name="other", resume=True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("{")
    assert "config.yaml: cannot be read" in error(run_name="broken", resume=True)
    (tmp_path / "file").write_text("")
    assert "is no directory" in error(run_name="file", resume=True)


def test_one_process_at_a_time(tiny_config: Make, tmp_path: Path) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    lock = tmp_path / "runs" / "run" / ".lock"
    hold = f"import fcntl; f = open('{lock}', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('locked', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match="run is being written by another process"):
            RunDirectory(tiny_config(resume=True))
        other.kill()  # with the process its lock goes
        other.wait()
    RunDirectory(tiny_config(resume=True))


def test_the_logs_hold_what_the_checkpoint_has_been_through(
    run: Make, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies while a checkpoint gets its name loses the step, and not the row alone."""
    import asyppo.run.durable

    seen: list[tuple[str, bool]] = []
    publish = asyppo.run.durable.publish

    def look(partial: Path, final: Path) -> None:
        steps = [json.loads(row)["step"] for row in (final.parent / "metrics.jsonl").read_text().splitlines()]
        seen.append((final.name, int(final.name.split("-")[1]) in steps))
        if final.name == "checkpoint-4":
            raise Stop
        publish(partial, final)

    monkeypatch.setattr(asyppo.run.durable, "publish", look)
    with pytest.raises(Stop):
        run("stopped")
    assert seen == [("checkpoint-2", True), ("checkpoint-4", True)]
    monkeypatch.undo()
    assert written(run("stopped", resume=True).run.path) == whole
