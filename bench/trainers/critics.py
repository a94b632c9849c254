"""``python -m bench.trainers.critics``: what critics of each kind add to a step, one thread of a CPU.

Trainers of one process take turns, a step each and in another order each time: CPU seconds, the median, and the
median and quartiles of their ratio to the step beside it of what they are held against. What the critics' own phases
add to the rest of their step does not depend on what the machine does between two steps. Peak memory is of processes
of their own, over what they held before the models were built. All steps have a pass for the old log-probs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median, quantiles
from typing import Any

import torch

from asyppo import AsyPPOConfig, AsyPPOTrainer
from asyppo.config import CriticConfig, DataConfig, SideConfig
from asyppo.models.critics import make_critics
from asyppo.run.progress import Timer
from bench.environment import ROOT
from bench.ops.training_forms import tokenizer_of
from bench.trainers.cases import CASES, QUICK, Reward, TrainerCase, model_of, policy_of, rows_of
from bench.trainers.contenders import CRITICS, forget_peak, peak_bytes

INPUTS = ["logprob", "entropy"]
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grpo": ("", "grpo", {}),
    "side transformer": ("grpo", "asyppo", {"kind": "side", "policy_inputs": INPUTS}),
    "side mlp": ("grpo", "asyppo", {"kind": "side", "side": SideConfig("mlp"), "policy_inputs": INPUTS}),
    "mini": ("grpo", "asyppo", {}),
    "mini, inputs": ("mini", "asyppo", {"policy_inputs": INPUTS}),
}
"""By name: what it is held against, the algorithm, and settings of the critics."""


def trainer_of(case: TrainerCase, arm: str, directory: str) -> AsyPPOTrainer:
    """The arm's trainer, with models of its own."""
    _, algorithm, changes = ARMS[arm]
    critic = CriticConfig(num_critics=CRITICS, **changes)
    critics = None
    if algorithm == "asyppo" and critic.kind == "mini":
        models = [model_of(case, case.critic, 1 + m, "ForTokenClassification") for m in range(CRITICS)]
        critics = make_critics(models, critic)
    reward: Any = Reward()
    config = AsyPPOConfig(
        algorithm=algorithm,
        critic=critic,
        data=DataConfig(eval_size=0),
        prompts_per_step=case.prompts,
        num_generations=case.generations,
        max_completion_length=case.completion,
        max_steps=1000,
        num_mini_batches=1,
        entropy_coef=0.0,
        old_per_token_logps="compute",
        log_completions=False,
        device="cpu",
        output_dir=directory,
    )
    return AsyPPOTrainer(
        policy=policy_of(case),
        critics=critics,
        tokenizer=tokenizer_of(case.vocabulary),
        reward_funcs=[reward],
        train_dataset=rows_of(case),
        config=config,
    )


def peak(case: TrainerCase, arm: str) -> int:
    """Bytes at the peak of two steps of an arm, in a process of its own."""
    command = [sys.executable, "-m", "bench.trainers.critics", "--case", case.name, "--peak", arm]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | one_thread, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def measure(case: TrainerCase, arms: list[str], steps: int) -> dict[str, list[dict[str, float]]]:
    """CPU seconds of ``steps`` steps of each arm, after one that does not count: of the whole, and of its phases."""
    Timer.clock = staticmethod(time.process_time)
    spent: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as directory:
        trainers = {arm: trainer_of(case, arm, directory) for arm in arms}
        for step in range(1, 2 + steps):
            first = step % len(arms)
            for arm in (*arms[first:], *arms[:first]):
                start = time.process_time()
                metrics = trainers[arm].step(step).metrics
                taken = {"whole": time.process_time() - start}
                taken |= {name[9:]: value for name, value in metrics.items() if name.startswith("timing_s/")}
                if step > 1:
                    spent[arm].append(taken)
                    print(json.dumps({"arm": arm, **taken}), file=sys.stderr, flush=True)
    return spent


def critics_share(step: dict[str, float]) -> float:
    """What the critics' own phases add to the rest of a step."""
    own = step.get("update_critic", 0.0) + step.get("values", 0.0)
    return own / (step["whole"] - own)


def rows(arms: list[str], spent: dict[str, list[dict[str, float]]], peaks: dict[str, int]) -> list[str]:
    """Markdown, a line an arm."""
    heads = ["held against", "CPU s a step", "ratio (quartiles)", "critics' phases add", "peak memory", "ratio"]
    lines = ["| | " + " | ".join(heads) + " |", "|---|---|" + "--:|" * (len(heads) - 1)]
    for arm in arms:
        other = ARMS[arm][0]
        cells = [arm, other or "–", *["–"] * 5]
        if arm in spent:
            cells[2] = f"{median(step['whole'] for step in spent[arm]):.3f}"
            cells[4] = f"{median(critics_share(step) for step in spent[arm]):.3f}"
        if arm in spent and other in spent:
            pairs = zip(spent[arm], spent[other], strict=True)
            low, middle, high = quantiles([a["whole"] / b["whole"] for a, b in pairs], n=4)
            cells[3] = f"{middle:.3f} ({low:.3f} to {high:.3f})"
        if arm in peaks:
            cells[5] = f"{peaks[arm] / 2**20:.0f} MiB"
        if arm in peaks and other in peaks:
            cells[6] = f"{peaks[arm] / peaks[other]:.3f}"
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Measure, and print a table a case."""
    parser = argparse.ArgumentParser(prog="python -m bench.trainers.critics", description=__doc__)
    named = {case.name: case for case in (*CASES, QUICK)}
    parser.add_argument("--case", action="append", choices=list(named), help="only this one (may be repeated)")
    parser.add_argument("--arm", action="append", choices=list(ARMS), help="only this one (may be repeated)")
    parser.add_argument("--steps", type=int, default=9, help="that count, of each")
    parser.add_argument("--only", choices=("time", "peak"), help="leave the other out")
    parser.add_argument("--peak", choices=list(ARMS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.case or [case.name for case in CASES]:
        case = named[name]
        if chosen.peak:
            held = forget_peak()
            with tempfile.TemporaryDirectory() as directory:
                trainer = trainer_of(case, chosen.peak, directory)
                for step in (1, 2):
                    trainer.step(step)
            print(peak_bytes() - held)
            return 0
        arms = chosen.arm or list(ARMS)
        spent = {} if chosen.only == "peak" else measure(case, arms, chosen.steps)
        peaks = {} if chosen.only == "time" else {arm: peak(case, arm) for arm in arms}
        print("\n".join([f"### {name}, {chosen.steps} steps", "", *rows(arms, spent, peaks), ""]), flush=True)
        print(json.dumps({"case": name, "seconds": spent, "peak_bytes": peaks}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
