"""How much of the oracle's value critics explain on responses that they have not learned from, while the policy stays.

``python docs/evidence/explained.py CONFIG [--steps N] [--held_out N] [--seed N] [--out FILE] [--arm "name: changes"]``,
from the repository's root, on chain sums alone. The policy never learns: every arm's critics learn the same N batches,
a step's responses each, as in a step. Held-out batches are those that would come
next. The oracle's value of a state
is the mean score of all held-out responses' states that are as far along and free of mistakes, or not: see oracle.py.
An arm's changes are settings as a mapping, such as ``inputs: {critic: {policy_inputs: [logprob, entropy]}}``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import oracle

from asyppo.cli.build import build_trainer, unnamed
from asyppo.config import load_config
from asyppo.rollout.collecting import Sampled
from asyppo.run.progress import Timer
from asyppo.run.rng import seed_everything
from asyppo.trainer import AsyPPOTrainer

INPUTS = {"policy_inputs": ["logprob", "entropy"]}
ARMS: dict[str, dict[str, Any]] = {
    "mini": {},
    "mini, inputs": {"critic": INPUTS},
    "side transformer": {"critic": {"kind": "side"} | INPUTS},
    "side MLP": {"critic": {"kind": "side", "side": {"network": "mlp"}} | INPUTS},
}
REPORTED = (1, 2, 4, 8, 16, 24)


def explained(value: Tensor, truth: Tensor) -> float:
    """Return the share of the variance of ``truth`` that ``value`` explains."""
    return float(1 - (truth - value).var() / truth.var())


def sampled(trainer: AsyPPOTrainer, number: int, seed: int) -> Sampled:
    """Return the batch of that number."""
    seed_everything(1_000_003 * seed + number)
    return trainer.rollout(number, Timer(trainer.device))


def truth_of(trainer: AsyPPOTrainer, batches: list[Sampled]) -> tuple[Tensor, Tensor]:
    """Return the oracle's value and the score [N] at all response tokens of ``batches``."""
    states = [oracle.states(one.batch, trainer.tokenizer) for one in batches]
    masks = [one.batch.mask for one in batches]
    right = torch.cat([s[0][m] for s, m in zip(states, masks, strict=True)])
    to_go = torch.cat([s[1][m] for s, m in zip(states, masks, strict=True)])
    score = torch.cat([one.batch.score[:, None].expand_as(m)[m] for one, m in zip(batches, masks, strict=True)])
    value = torch.zeros_like(score)
    for number in to_go.unique():
        for is_right in (True, False):
            alike = (to_go == number) & (right == is_right)
            value[alike] = score[alike].mean()
    return value, score


def values(trainer: AsyPPOTrainer, batches: list[Sampled]) -> Tensor:
    """Return what the trainer's critics say at all response tokens of ``batches``, [M, N]."""
    assert trainer.critics is not None
    found = []
    for one in batches:
        batch, _ = trainer.observe(one.batch)
        value = trainer.critics.values(batch, trainer.config.max_tokens_per_micro_batch)
        found.append(value[:, batch.mask])
    return torch.cat(found, dim=1)


def main() -> None:
    """Print a row of each arm as it learns, and the table of the last ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--held_out", type=int, default=8, help="batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arm", action="append", default=[], help="'name: {settings}' in place of the usual ones")
    parser.add_argument("--out", type=Path, help="a JSON file of all rows")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    arms = {k: v for text in chosen.arm for k, v in yaml.safe_load(text).items()} or ARMS
    trainers: dict[str, AsyPPOTrainer] = {}
    for name, changes in arms.items():
        critic = {"warmup_steps": chosen.steps} | changes.get("critic", {})
        run = {"seed": chosen.seed, "max_steps": chosen.steps + 1, "diagnostics_steps": 0, "eval": {"every": 0}}
        trainers[name] = build_trainer(unnamed(load_config(chosen.config, changes | run | {"critic": critic})))
    first = next(iter(trainers.values()))
    held_out = [sampled(first, chosen.steps + 1 + i, chosen.seed) for i in range(chosen.held_out)]
    truth, score = truth_of(first, held_out)
    responses = sum(len(one.batch) for one in held_out)
    print(f"{responses} held-out responses, mean score {float(score.mean()):.3f} over tokens")
    print(f"the oracle explains {explained(truth, score):.3f} of the scores", flush=True)
    rows = []
    seconds = dict.fromkeys(trainers, 0.0)
    for step in range(1, chosen.steps + 1):
        batch = sampled(first, step, chosen.seed)
        for name, trainer in trainers.items():
            start = time.process_time()
            trainer.step(step, replace(batch))
            seconds[name] += time.process_time() - start
        if step not in REPORTED and step != chosen.steps:
            continue
        for name, trainer in trainers.items():
            found = values(trainer, held_out)
            rows.append(
                {
                    "arm": name,
                    "steps": step,
                    "responses of a critic": step * len(batch.batch) // len(found),
                    "oracle explained by V": round(explained(found.mean(0), truth), 3),
                    "by each critic": [round(explained(own, truth), 3) for own in found],
                    "scores explained by V": round(explained(found.mean(0), score), 3),
                    "CPU s of the steps": round(seconds[name], 1),
                }
            )
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
        if chosen.out:
            about = {"held-out responses": responses, "oracle of scores": round(explained(truth, score), 3)}
            chosen.out.write_text(json.dumps({**about, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
