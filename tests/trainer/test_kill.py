"""Real processes: killed at random moments and in the middle of writes, and stopped by signals. Nothing is lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from asyppo.checkpoint import checkpoints
from asyppo.cli.main import main
from asyppo.run.directory import read_jsonl
from asyppo.run.durable import damage

STEPS = 12
CONFIG = """
max_steps: 12
save_steps: 2
save_total_limit: 2
output_dir: {tmp}/runs
prompts_per_step: 2
num_generations: 4
max_completion_length: 6
num_mini_batches: 2
learning_rate: 1.0e-3
logging_samples: 3
data:
  task: {{name: chain_sum, params: {{min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}}}
  train_size: 20
  eval_size: 4
warm_start:
  steps: 2
  batch_size: 4
  policy: &shape {{hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,
    intermediate_size: 32}}
  critic: *shape
  cache_dir: {tmp}/cache
eval: {{every: 3, num_generations: 2}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``tiny.yaml``, a cached warm start, and the run ``whole`` that nothing stopped."""
    place = tmp_path_factory.mktemp("kill")
    (place / "tiny.yaml").write_text(CONFIG.format(tmp=place))
    process = start(place, "whole")
    process.join()
    assert len(read_jsonl(place / "runs" / "whole" / "metrics.jsonl")) == STEPS + 1
    return place


def arguments(place: Path, name: str) -> list[str]:
    """The same command starts a run and goes on with it."""
    return ["train", "--config", str(place / "tiny.yaml"), "--run_name", name, "--resume"]


def start(place: Path, name: str) -> Any:
    """Train in a process of its own, a fork of one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["asyppo.cli.main", "asyppo.cli.build", "asyppo.report", "reasoning_gym"])
    process = context.Process(target=main, args=(arguments(place, name),))
    process.start()
    return process


def written(run: Path) -> dict[str, Any]:
    """All that a killed run is to have in common with one that was not: logs, report, and the last weights."""
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    names = [name for name in board.Tags()["scalars"] if not name.startswith(("timing_s/", "perf/"))]
    last = run / f"checkpoint-{STEPS}"
    return {
        "metrics": [
            {k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))}
            for row in read_jsonl(run / "metrics.jsonl")
        ],
        "samples": read_jsonl(run / "samples.jsonl"),
        "tensorboard": {name: [(point.step, point.value) for point in board.Scalars(name)] for name in names},
        "weights": {path.relative_to(last): path.read_bytes() for path in last.glob("*/model.safetensors")},
        "files": {path.name for path in run.iterdir()},
    }


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "a while after its start": lambda run: (run / "config.yaml").exists(),
    "while a checkpoint is written": lambda run: any(run.glob(".checkpoint-*.partial")),
    "while a checkpoint is sealed": lambda run: any(run.glob(".checkpoint-*.partial/manifest.json")),
    "while a checkpoint is deleted": lambda run: any(run.glob(".checkpoint-*.removed")),
    "before it does anything": lambda run: True,
}


def kill_at(moment: str, delay: float, process: Any, run: Path) -> None:
    """Wait for a moment, and kill -9. A run that ends before it is there is not killed."""
    while not MOMENTS[moment](run) and process.is_alive():
        time.sleep(0.0005)
    time.sleep(delay)
    process.kill()
    process.join()


def survives(place: Path, name: str, moments: list[tuple[str, float]]) -> None:
    """Kill a run at each of these moments, go on to its end, and compare it with the whole one."""
    run, last = place / "runs" / name, 0
    for moment, delay in moments:
        kill_at(moment, delay, start(place, name), run)
        found = checkpoints(run) if run.exists() else []
        assert [damage(path) for path in found] == [None] * len(found), moment
        step = int(found[-1].name.split("-")[1]) if found else 0
        assert step >= last, (moment, delay)
        last = step
    process = start(place, name)
    process.join()
    assert process.exitcode == 0
    assert written(run) == written(place / "runs" / "whole"), moments


@pytest.mark.slow
def test_three_kills(place: Path) -> None:
    chance = random.Random(0)
    names = ["a while after its start", "while a checkpoint is written", "a while after its start"]
    survives(place, "three", [(name, chance.uniform(0, 0.6 if "while after" in name else 0.03)) for name in names])


@pytest.mark.slow
def test_twenty_kills(place: Path) -> None:
    chance = random.Random(1)
    for part in range(4):  # a run of its own, five times each: else most of them would find it at its end
        names = chance.sample(list(MOMENTS), 5)
        delays = {"a while after its start": 1.0, "before it does anything": 0.5}
        moments = [(name, chance.uniform(0, delays.get(name, 0.03))) for name in names]
        survives(place, f"five-{part}", moments)


@pytest.mark.slow
def test_a_kill_in_the_warm_start(tmp_path: Path, place: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(tmp=tmp_path))
    cache = tmp_path / "cache"
    for delay in (0.0, 0.01, 0.1):
        process = start(tmp_path, "run")
        while not (cache.exists() and any(cache.glob(".warm-start-*"))) and process.is_alive():
            time.sleep(0.0005)
        time.sleep(delay)
        process.kill()
        process.join()
    process = start(tmp_path, "run")
    process.join()
    assert written(tmp_path / "runs" / "run") == written(place / "runs" / "whole")


# --- signals ---


def command(place: Path, name: str, *more: str) -> subprocess.Popen[str]:
    """``asyppo train`` as a user starts it."""

    def default_handlers() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # whatever starts the tests may ignore them

    return subprocess.Popen(
        [sys.executable, "-m", "asyppo", *arguments(place, name), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_handlers,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def lines_until(process: subprocess.Popen[str], pattern: str) -> list[str]:
    """Read the process's errors up to the first line with ``pattern``."""
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line.rstrip("\n"))
        if re.search(pattern, line):
            break
    return lines


def test_one_signal(place: Path) -> None:
    process = command(place, "signalled")
    lines_until(process, r"^step 3/")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    lines = err.splitlines()
    run = place / "runs" / "signalled"
    assert process.returncode == 143
    assert out == ""
    assert "asyppo: SIGTERM: finishing this step and saving; once more to stop at once" in lines
    assert lines[-1] == (
        f"asyppo: stopped by SIGTERM; to go on: asyppo train --config {run}/config.yaml --run_name signalled --resume"
    )
    assert "Traceback" not in err
    stopped = read_jsonl(run / "metrics.jsonl")[-1]["step"]
    assert 3 <= stopped < STEPS
    assert checkpoints(run)[-1].name == f"checkpoint-{stopped}"
    assert main(lines[-1].split("to go on: asyppo ")[1].split()) == 0
    assert written(run) == written(place / "runs" / "whole")


@pytest.mark.slow
def test_two_signals(place: Path) -> None:
    process = command(place, "twice")
    lines_until(process, r"^step 3/")
    process.send_signal(signal.SIGINT)
    lines_until(process, "finishing this step")
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    out, err = process.communicate()
    assert process.returncode == 130
    assert time.monotonic() - begin < 10
    assert (out, err.splitlines()[-1]) == ("", "asyppo: SIGINT: stopped at once")
    assert not (place / "runs" / "twice" / "report.html").exists()


@pytest.mark.slow
def test_a_signal_before_the_first_step(place: Path) -> None:
    process = command(place, "early", "--warm_start.steps", "100000")
    lines_until(process, "^teach the policy 50/")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 143
    assert out == ""
    assert [line for line in err.splitlines() if not line.startswith("teach")] == ["asyppo: SIGTERM: stopped at once"]
    assert not (place / "runs" / "early").exists()
