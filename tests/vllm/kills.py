"""``python -m tests.vllm.kills``: kill -9 of trainer or engine at random moments, again and again, of one run.

The moments are spread over the seconds in which the run starts and those in which it steps. After each kill nothing may
be left running and no weights may lie in memory; a trainer whose engine was killed has to end by itself, with status
1 and a line that names vLLM. In the end the run goes on undisturbed, and its steps and the prompts of each have to be
those of a run that nobody disturbed. Half a minute a kill; needs the environment of ``make test-vllm``.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from asyppo.rollout.samplers.vllm.weights import PREFIX, path_of
from tests.vllm.training import children, running, training_command

STEPS_SECONDS = 4.0
"""A kill falls within as long after the first new step, or while the engine starts."""
WAIT_SECONDS = 60.0


def main() -> int:
    """0 if nothing was lost and nothing left."""
    parser = argparse.ArgumentParser(prog="python -m tests.vllm.kills", description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async_generation", type=int, choices=(0, 1), default=0)
    chosen = parser.parse_args()
    moments = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"async_generation": chosen.async_generation, "logging_samples": 8, "max_steps": 100_000}
        command = training_command(Path(folder), rows="abcdefghijklmnop", **settings)
        run = Path(folder) / "runs" / "run"
        problems: list[str] = []
        for i in range(chosen.times):
            found = killed(command, run, moments, engine=i % 2 == 1)
            problems += [f"kill {i + 1}: {problem}" for problem in found]
        reached = last_step(run)
        done = subprocess.run([*command, "--max_steps", str(reached + 2)], capture_output=True, text=True)
        if done.returncode:
            problems.append(f"going on ended with {done.returncode}: {done.stderr[-500:]}")
        calm = ["--run_name", "calm", "--sampler", "generate", "--async_generation", "0"]
        subprocess.run([*command, *calm, "--max_steps", str(reached + 2)], check=True, capture_output=True)
        steps = [row["step"] for row in rows(run / "metrics.jsonl")]
        if steps != list(range(1, reached + 3)):
            problems.append(f"steps in metrics.jsonl: {steps}")
        if prompts(run) != prompts(run.with_name("calm")):
            problems.append("prompts are not those of an undisturbed run")
        print(f"{chosen.times} kills, {len(steps)} steps; {'; '.join(problems) or 'nothing lost, nothing left'}")
    return 1 if problems else 0


def killed(command: list[str], run: Path, moments: random.Random, engine: bool) -> list[str]:
    """Start the run, kill its trainer or its engine at a random moment, and say what was wrong after that."""
    problems, before = [], last_step(run)
    while_starting = moments.random() < 0.3
    output = run.parent.parent / "output"
    with open(output, "w") as file:
        trainer = subprocess.Popen(command, stdout=file, stderr=file)
    end = time.monotonic() + 300
    engines: list[int] = []
    while time.monotonic() < end and trainer.poll() is None:
        engines = children(trainer.pid)
        if engines if while_starting else last_step(run) > before:
            break
        time.sleep(0.2)
    else:
        trainer.kill()
        return [f"did not get so far as to be killed: {output.read_text()[-500:]}"]
    time.sleep(moments.uniform(0, STEPS_SECONDS))
    engines = sorted({*engines, *children(trainer.pid)})
    victim = engines[0] if engine else trainer.pid
    moment = f"{'engine' if engine else 'trainer'} {'while it starts' if while_starting else 'in a step'}"
    subprocess.run(["kill", f"-{signal.SIGKILL.value}", str(victim)], check=True)
    try:
        status = trainer.wait(WAIT_SECONDS)
    except subprocess.TimeoutExpired:
        trainer.kill()
        return [f"{moment}: the trainer went on for {WAIT_SECONDS:.0f} seconds"]
    text = output.read_text()
    if engine and status != 1:
        problems.append(f"exit status {status}: {text[-500:]}")
    if engine and "vLLM" not in text.strip().split("\n")[-1]:
        problems.append(f"the last line does not name vLLM: {text[-500:]}")
    end = time.monotonic() + 20
    while (alive := [pid for pid in engines if running(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    if alive:
        problems.append(f"left running: {alive}")
    if left := [path.name for path in path_of("x").parent.glob(f"*{PREFIX}*") if not owned(path)]:
        problems.append(f"weights left in memory: {left}")
    print(f"{moment}, step {before} to {last_step(run)}: {'; '.join(problems) or 'nothing left'}", flush=True)
    return problems


def owned(weights: Path) -> bool:
    """Whether the process that made a directory of weights lives, as that of another run may."""
    with suppress(FileNotFoundError), open(weights / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return not weights.exists()


def rows(path: Path) -> list[dict[str, object]]:
    """The rows of a file of JSON lines, but for one that is being written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def last_step(run: Path) -> int:
    """The newest step that was saved."""
    return max((int(p.name.split("-")[1]) for p in run.glob("checkpoint-*")), default=0)


def prompts(run: Path) -> list[tuple[object, object]]:
    """(step, prompt) of each response, in order."""
    return [(row["step"], row["prompt"]) for row in rows(run / "samples.jsonl")]


if __name__ == "__main__":
    sys.exit(main())
