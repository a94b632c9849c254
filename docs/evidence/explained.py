"""How much of the oracle's value critics explain on responses that they have not learned from, while the policy stays.

``python docs/evidence/explained.py docs/evidence/long.yaml --teach 500``, from the repository's root, on chain sums.
The policy never learns: every arm's critics learn the same batches, of a step's responses each, as in a step. Held-out
batches are those that would come next. The oracle's value of a state is the mean score of all held-out responses'
states that are as far along and free of mistakes, or not: see oracle.py. It is only the truth of a policy whose totals
follow from those before them, wrong ones too. ``--teach N`` gives a warm start that has not learned this N more steps,
at more noise, and keeps the result beside it. ``--arm`` takes other arms: settings as a mapping,
``"inputs: {critic: {policy_inputs: [logprob, entropy]}}"``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import oracle

from asyppo.cli.build import build_trainer, unnamed
from asyppo.config import AsyPPOConfig, load_config
from asyppo.config.files import merged
from asyppo.data.sources import load_eval_rows, load_train_rows
from asyppo.models import warm_start
from asyppo.models.critics import CriticOptimizer
from asyppo.models.loading import critics_of
from asyppo.rollout.collecting import Sampled
from asyppo.run.progress import Timer
from asyppo.run.rng import seed_everything
from asyppo.trainer import AsyPPOTrainer

INPUTS: dict[str, Any] = {"policy_inputs": ["logprob", "entropy"]}
ARMS: dict[str, dict[str, Any]] = {
    "mini": {},
    "mini, inputs": {"critic": INPUTS},
    "mini, inputs, one learning rate": {"critic": INPUTS | {"policy_inputs_lr_ratio": 1.0}},
    "side transformer, inputs": {"critic": {"kind": "side"} | INPUTS},
    "side MLP, inputs": {"critic": {"kind": "side", "side": {"network": "mlp"}} | INPUTS},
}
REPORTED = (4, 8, 16, 24)
NOISE = 0.08
LEARNING_RATES = 1.2e-3, 3e-4  # of teaching on: linearly from one to the other


def explained(value: Tensor, truth: Tensor) -> float:
    """Return the share of the variance of ``truth`` that ``value`` explains."""
    return float(1 - (truth - value).var() / truth.var())


def models_of(config: AsyPPOConfig, steps: int) -> tuple[str, str]:
    """Return where policy and critic of the warm start of ``config`` are, the policy taught ``steps`` more."""
    start, data = config.warm_start, config.data
    assert start is not None
    rows = load_train_rows(data, load_eval_rows(data))
    policy, critic = warm_start.build(start, data, rows, torch.device("cpu"))
    if steps:
        taught = policy.with_name(f"policy-and-{steps}")
        if not taught.exists():
            teach(policy, taught, steps, rows, replace(start, noise=NOISE))
        policy = taught
    return str(policy), str(critic)


def trainer_with(first: AsyPPOTrainer, config: AsyPPOConfig, path: str) -> AsyPPOTrainer:
    """Return a trainer with the policy and the data of ``first`` and critics of its own, mini ones from ``path``."""
    made = first.with_settings(config)
    made.critics = critics_of(path if config.critic.kind == "mini" else None, config, first.policy)
    assert made.critics is not None
    critic = config.critic
    made.critic_optimizer = CriticOptimizer(
        made.critics,
        learning_rate=critic.learning_rate,
        weight_decay=critic.weight_decay,
        policy_inputs_lr_ratio=critic.policy_inputs_lr_ratio,
    )
    return made


def teach(source: Path, target: Path, steps: int, rows: Any, config: Any) -> None:
    """Give the policy in ``source`` more of the steps of a warm start, and write it to ``target``. Every 25 steps its
    state is kept beside it, to go on from."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    rng, pad = random.Random(config.seed + 1), torch.nn.utils.rnn.pad_sequence
    first, last = LEARNING_RATES
    kept, done = target.with_suffix(".pt"), 0
    if kept.exists():
        state = torch.load(kept, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rng.setstate(state["rng"])
        done = state["step"]
    for step in range(done, steps):
        optimizer.param_groups[0]["lr"] = (first + (last - first) * step / steps) * min(1.0, (step + 1) / 30)
        chosen = rng.sample(range(len(rows)), config.batch_size)
        prompts = tokenizer([rows[i]["prompt"] for i in chosen])["input_ids"]
        texts = [warm_start.worked_solution(rows[i], config.noise, config.guess, rng) for i in chosen]
        responses = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
        both = list(zip(prompts, responses, strict=True))
        ids = pad([torch.tensor(p + r) for p, r in both], batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = pad([torch.tensor([-100] * len(p) + r) for p, r in both], batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            print(f"taught {step + 1} of {steps} steps, loss {loss.item():.3f}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"rng": rng.getstate(), "step": step + 1}, kept.with_suffix(".part"))
            kept.with_suffix(".part").replace(kept)
    partial = target.with_name(f".{target.name}")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(target)
    kept.unlink(missing_ok=True)


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
            if alike.any():
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


def table(found: dict[str, Any]) -> str:
    """Return what V̄ explains of the oracle's value, by arm and by responses of a critic, as a Markdown table."""
    value = {(row["arm"], row["responses of a critic"]): row for row in found["rows"]}
    arms, counts = ([*dict.fromkeys(key[i] for key in value)] for i in (0, 1))
    lines = [
        f"| explained by V̄, after responses of a critic | {' | '.join(f'{count:,}' for count in counts)} "
        "| CPU s of the steps |",
        f"|---|{'--:|' * (len(counts) + 1)}",
    ]
    for arm in arms:
        own = [value[arm, count] for count in counts]
        cells = [f"{round(row['oracle explained by V'], 2) + 0.0:.2f}" for row in own] + [
            str(own[-1]["CPU s of the steps"])
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print a row of each arm as it learns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--held_out", type=int, default=8, help="batches")
    parser.add_argument("--teach", type=int, default=0, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arm", action="append", default=[], help="'name: {settings}' in place of the usual ones")
    parser.add_argument("--out", type=Path, help="a JSON file of all rows")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    arms = {k: v for text in chosen.arm for k, v in yaml.safe_load(text).items()} or ARMS
    run = {"seed": chosen.seed, "max_steps": chosen.steps + 1, "diagnostics_steps": 0, "eval": {"every": 0}}
    run["critic"] = {"warmup_steps": chosen.steps}
    policy, critic = models_of(load_config(chosen.config), chosen.teach)
    base = run | {"warm_start": None, "algorithm": "grpo", "policy": {"model_name_or_path": policy}}
    first = build_trainer(unnamed(load_config(chosen.config, base)))
    trainers = {
        name: trainer_with(first, unnamed(load_config(chosen.config, merged(run, changes))), critic)
        for name, changes in arms.items()
    }
    held_out = [sampled(first, chosen.steps + 1 + i, chosen.seed) for i in range(chosen.held_out)]
    truth, score = truth_of(first, held_out)
    about = {
        "held-out responses": sum(len(one.batch) for one in held_out),
        "mean score": round(float(torch.cat([one.batch.score for one in held_out]).mean()), 3),
        "scores explained by the oracle": round(explained(truth, score), 3),
    }
    print(json.dumps(about), flush=True)
    rows = []
    seconds = dict.fromkeys(trainers, 0.0)
    for step in range(1, chosen.steps + 1):
        batch = sampled(first, step, chosen.seed)
        for name, trainer in trainers.items():
            start = time.process_time()
            trainer.step(step, batch)
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
            chosen.out.write_text(json.dumps({**about, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
    print(table({"rows": rows}))


if __name__ == "__main__":
    main()
