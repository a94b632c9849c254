"""How often a policy is right on held-out prompts: avg@k and pass@k, with intervals, over all prompts and by task."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState

from asyppo.config import AsyPPOConfig
from asyppo.data.prompts import prompt_text
from asyppo.data.rows import Row
from asyppo.distributed.processes import forked_rng
from asyppo.rewards.built_in import RewardFunc
from asyppo.rewards.computing import compute_rewards
from asyppo.rewards.function import RewardFunction, resolve_reward_funcs
from asyppo.rollout.environments import Episode, Playing, episode_rewards
from asyppo.rollout.samplers import Response, Sampler


@dataclass(frozen=True)
class Estimate:
    """A fraction in [0, 1] and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Evaluation:
    """Which of ``num_generations`` responses to each prompt are right."""

    tasks: list[str]
    """Of each prompt, the name of its task, as ``task_name`` has it."""
    right: list[list[bool]]
    """[prompt][response]."""
    samples: list[dict[str, Any]]
    """Every response, prompt by prompt: prompt, completion, reward (the weighted sum), rewards by function, truncated,
    response_length in tokens, task, and under ``extra`` what reward functions logged of it."""
    logged: dict[str, float] = field(default_factory=dict)
    """Means of the metrics that reward functions logged."""

    @property
    def num_generations(self) -> int:
        """k of avg@k; pass@k is estimated for every power of two up to it, and for itself."""
        return len(self.right[0])

    @property
    def accuracy(self) -> float:
        """avg@k over all prompts."""
        return self.estimate(1).value

    def task_names(self) -> list[str]:
        """Return the tasks in order of appearance, if there is more than one."""
        names = list(dict.fromkeys(self.tasks))
        return names if len(names) > 1 else []

    def ks(self) -> list[int]:
        """Return the k > 1 of which there is a pass@k."""
        n = self.num_generations
        return [2**i for i in range(1, n.bit_length()) if 2**i < n] + ([n] if n > 1 else [])

    def estimate(self, k: int, task: str | None = None) -> Estimate:
        """Return pass@k over the prompts of ``task`` (None: of all); pass@1 is avg@num_generations."""
        chosen = [right for right, of in zip(self.right, self.tasks, strict=True) if task in (None, of)]
        return clustered_estimate([pass_at_k(len(r), sum(r), k) for r in chosen], self.num_generations)

    def metrics(self) -> dict[str, float]:
        """Return the row of ``metrics.jsonl``: accuracy with its interval, pass@k, and each task's accuracy."""
        overall = self.estimate(1)
        row = {f"eval/{name}": value for name, value in self.logged.items()} | {
            "eval/accuracy": overall.value,
            "eval/accuracy/ci_low": overall.low,
            "eval/accuracy/ci_high": overall.high,
        }
        row |= {f"eval/pass@{k}": self.estimate(k).value for k in self.ks()}
        row |= {f"eval/{task}/accuracy": self.estimate(1, task).value for task in self.task_names()}
        row["eval/response_length/mean"] = _mean([sample["response_length"] for sample in self.samples])
        row["eval/response_length/clip_ratio"] = _mean([sample["truncated"] for sample in self.samples])
        return row

    def results(self) -> dict[str, Any]:
        """Return what ``eval.json`` holds: for all prompts and for each task, every estimate with its interval."""

        def of(task: str | None) -> dict[str, Any]:
            samples = [s for s in self.samples if task in (None, s["task"])]
            return {
                "prompts": len(samples) // self.num_generations,
                f"avg@{self.num_generations}": vars(self.estimate(1, task)),
                **{f"pass@{k}": vars(self.estimate(k, task)) for k in self.ks()},
                "response_length": _mean([s["response_length"] for s in samples]),
                "truncated": _mean([s["truncated"] for s in samples]),
            }

        return {"all": of(None), "tasks": {task or "other": of(task) for task in self.task_names()}}

    def table(self) -> str:
        """Return the results as lines of text with aligned columns; intervals in brackets."""
        results = self.results()
        cells: list[list[str]] = []
        for name, row in [*results["tasks"].items(), ("all", results["all"])]:
            cells = cells or [["task", *row]]
            estimates = [str(Estimate(**v)) if isinstance(v, dict) else f"{v:.4g}" for v in row.values()]
            cells.append([name, *estimates])
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def task_name(row: Row) -> str:
    """Return the name of a row's task: its column ``task``, as JSON where that is no text; "other" where it has none,
    or one without a value."""
    task = row.get("task")
    if task is None or task == "":
        return "other"
    return task if isinstance(task, str) else json.dumps(task, sort_keys=True, default=str)


def policy_length(response: Response) -> int:
    """Return how many tokens of ``response`` the policy drew."""
    return int(response.policy.sum()) if isinstance(response, Episode) else len(response.tokens)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the probability that among k of n responses, drawn without putting back, at least one is right: the
    unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374, equation 1)."""
    return (math.comb(n, k) - math.comb(n - right, k)) / math.comb(n, k)


def clustered_estimate(scores: Sequence[float], responses: int, z: float = 1.959964) -> Estimate:
    """Return the mean of the prompts' scores in [0, 1] and its 95 % interval.

    Responses to one prompt are alike, so prompts, not responses, are what was drawn independently. The interval is
    Wilson's with the effective sample size p (1 - p) / SE^2, SE being the standard error of the mean over prompts; as
    in surveys drawn in clusters (Franco et al. 2019, doi 10.1093/jssam/smy019). Unlike mean +- 2 SE or a bootstrap it
    does not shrink to a point where every response is right, or none. The effective size is at most one a response.
    """
    n, p = len(scores), _mean(scores)
    variance = sum((score - p) ** 2 for score in scores) / max(n - 1, 1) / n
    size = float(n)
    if 0 < p < 1 and n > 1:
        size = min(p * (1 - p) / variance, n * responses) if variance > 0 else n * responses
    centre, spread = p + z**2 / (2 * size), z * math.sqrt(p * (1 - p) / size + z**2 / (4 * size**2))
    scale = 1 + z**2 / size
    # Rounding must not push an end of the interval past 0, past 1, or to the wrong side of p.
    return Estimate(p, max(0.0, min(p, (centre - spread) / scale)), min(1.0, max(p, (centre + spread) / scale)))


def evaluate(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    prompts: Sequence[Tensor],
    reward_funcs: Sequence[RewardFunc | RewardFunction],
    config: AsyPPOConfig,
    *,
    progress: Callable[[int], None] = lambda count: None,
    trainer_state: TrainerState | None = None,
    playing: Playing | None = None,
) -> Evaluation:
    """Sample ``config.eval.num_generations`` responses to each of ``prompts``, the tokens (int64 [length]) of ``rows``,
    and see which are right: those that get a 1 from the first of ``reward_funcs`` that has a reward for them.

    Torch's generator is seeded with ``data.eval_seed`` and put back afterwards, so evaluations compare like with like
    and training does not notice them. ``progress`` is called now and then with the number of new samples.
    Reward functions see ``trainer_state``. With ``playing`` a response is an episode with an environment, whose own
    reward comes after those of the functions; lengths are then of the policy's tokens.
    """
    num_generations = config.eval.num_generations
    numbers = [i for i in range(len(prompts)) for _ in range(num_generations)]
    # A few of the sampler's batches at a time, in its own order: what is drawn is what one call would draw.
    order = sorted(range(len(numbers)), key=lambda j: len(prompts[numbers[j]]))
    at_once = config.generation_batch_size * math.ceil(len(order) / (20 * config.generation_batch_size))
    responses: list[Any] = [None] * len(order)
    repeated = [rows[i] for i in numbers]
    known: dict[str, Any] = {"weights": config.reward_weights, "trainer_state": trainer_state}
    with forked_rng():
        torch.manual_seed(config.data.eval_seed)
        if playing is not None:  # all at once: environments are reset for the next ones
            played = playing(sampler, repeated, config.eval.temperature)
            responses = [one.response for one in played]
            progress(len(order))
        else:
            for start in range(0, len(order), at_once):
                chosen = order[start : start + at_once]
                drawn = sampler.sample(
                    [prompts[numbers[j]] for j in chosen],
                    max_completion_length=config.max_completion_length,
                    temperature=config.eval.temperature,
                )
                for j, response in zip(chosen, drawn, strict=True):
                    responses[j] = response
                progress(len(chosen))
    completions = tokenizer.batch_decode([r.tokens for r in responses], skip_special_tokens=True)
    if playing is not None:
        rewards = episode_rewards(
            resolve_reward_funcs(list(reward_funcs)), repeated, played, playing.reward_names, **known
        )
    else:
        ids = [response.tokens.tolist() for response in responses]
        rewards = compute_rewards(reward_funcs, repeated, completions, ids, **known)
    samples = [
        {
            "prompt": prompt_text(row["prompt"]),
            "completion": completion,
            "reward": score,
            "rewards": sample_rewards,
            "truncated": response.truncated,
            "response_length": policy_length(response),
            "task": task_name(row),
            **({"extra": extra} if extra else {}),
        }
        for row, completion, score, sample_rewards, response, extra in zip(
            repeated,
            completions,
            rewards.scores,
            rewards.by_sample,
            responses,
            rewards.extra_by_sample,
            strict=True,
        )
    ]
    right = [
        next((r for r in sample_rewards.values() if r is not None), 0.0) >= 1 for sample_rewards in rewards.by_sample
    ]
    starts = range(0, len(right), num_generations)
    tasks = [task_name(row) for row in rows]
    return Evaluation(tasks, [right[s : s + num_generations] for s in starts], samples, rewards.logged.means())
