"""One whole step against a plain re-statement of the paper's formulas (arXiv 2510.01656).

The re-statement shares no code with the trainer: sequences go through the models one at a time without padding, logits
are whole, quantiles come from sorting, GAE from a loop, gradients from autograd, updates from torch's AdamW.
What it takes from the trainer is chance: which critic got which response, and how minibatches were cut.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import asyppo.trainer
from asyppo.config import AsyPPOConfig
from asyppo.trainer import AsyPPOTrainer


@dataclass
class Sample:
    """One response with what the step knows of it; lists run over its tokens."""

    prompt: list[int]
    response: list[int]
    prompt_number: int
    score: float


def logits_at_responses(model: Any, sample: Sample) -> Tensor:
    """Outputs of a model at the positions that predict the response's tokens."""
    tokens = torch.tensor([sample.prompt + sample.response])
    start = len(sample.prompt) - 1
    return model(tokens).logits[0, start : start + len(sample.response)]


def logprob_entropy(model: Any, sample: Sample, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob of each token of the response, and the entropy where it was drawn."""
    p = torch.softmax(logits_at_responses(model, sample).double() / temperature, dim=-1)
    chosen = p[torch.arange(len(sample.response)), torch.tensor(sample.response)]
    return chosen.log(), -(p * p.log()).sum(-1)


def values(critic: Any, sample: Sample) -> Tensor:
    """V(s_t) of each token."""
    return logits_at_responses(critic, sample)[:, 0].double()


def gae(value: list[float], score: float, gamma: float, lam: float) -> list[float]:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, the reward being at the last token."""
    length = len(value)
    deltas = [
        (score if t == length - 1 else 0.0) + (gamma * value[t + 1] if t < length - 1 else 0.0) - value[t]
        for t in range(length)
    ]
    return [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, length)) for t in range(length)]


def step(optimizer: torch.optim.Optimizer, model: Any, loss: Tensor, max_norm: float) -> None:
    """Gradient, clipping of its norm, AdamW."""
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    for gradient in gradients:
        gradient.mul_(min(1.0, max_norm / norm))
    optimizer.step()


def masks_of(deviations: list[float], k: float, h: float) -> tuple[list[bool], list[bool]]:
    """I^A without the lowest k, I^H without the highest h, by sorting."""
    ordered = sorted(deviations)
    low = ordered[math.floor(round(k * len(ordered), 6))]
    high = ordered[len(ordered) - 1 - math.floor(round(h * len(ordered), 6))]
    # All responses of a prompt begin in one state. Were a threshold there, rounding would decide: choose another seed.
    assert all(s == low or abs(s - low) > 1e-5 for s in ordered if k)
    assert all(s == high or abs(s - high) > 1e-5 for s in ordered if h)
    return [s >= low for s in deviations], [s <= high for s in deviations]


def restated_step(
    config: AsyPPOConfig,
    policy: Any,
    critics: list[Any],
    samples: list[Sample],
    share: list[int] | None,
    minibatches: list[list[int]],
    optimizers: list[torch.optim.Optimizer],
    reference: Any,
    train_policy: bool,
) -> None:
    """Update ``policy`` and ``critics`` in place. ``minibatches``: rows of each update, those of the critics first."""
    gamma, todo = config.gamma, iter(minibatches)
    with torch.no_grad():
        old = [logprob_entropy(policy, s, config.temperature)[0] for s in samples]
        ref = [logprob_entropy(reference, s, config.temperature)[0] for s in samples]

    # Critics, each on its own share, or on all responses.
    for m, critic in enumerate(critics):
        own = [row for row in range(len(samples)) if share is None or share[row] == m]
        with torch.no_grad():
            returns = []
            for s in samples:
                v = values(critic, s).tolist()
                advantage = gae(v, s.score, gamma, config.critic.value_lambda)
                returns.append(torch.tensor([a + x for a, x in zip(advantage, v, strict=True)]))
        for _ in range(config.critic.num_iterations):
            learned = []
            for _ in range(config.critic.num_mini_batches):
                rows = next(todo)
                learned += rows
                errors = torch.cat([(values(critic, samples[row]) - returns[row]).square() for row in rows])
                step(optimizers[1 + m], critic, errors.mean(), config.critic.max_grad_norm)
            assert sorted(learned) == own

    # Advantages and masks.
    if critics:
        with torch.no_grad():
            value = [torch.stack([values(critic, s) for critic in critics]) for s in samples]
        # Responses that begin alike have states in common, whose values differ in their last bits, on some processors.
        of_state: dict[tuple[int, ...], float] = {}
        deviation = [
            [
                of_state.setdefault((*s.prompt, *s.response[:t]), float(v[:, t].std(correction=0)))
                for t in range(v.shape[1])
            ]
            for v, s in zip(value, samples, strict=True)
        ]
        advantage = [gae(v.mean(0).tolist(), s.score, gamma, config.lam) for v, s in zip(value, samples, strict=True)]
        if config.whiten != "none":
            for prompt in {s.prompt_number for s in samples} if config.whiten == "group" else {None}:
                chosen = [i for i, s in enumerate(samples) if prompt in (None, s.prompt_number)]
                flat = [a for i in chosen for a in advantage[i]]
                mean = sum(flat) / len(flat)
                spread = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat) + 1e-8)
                for i in chosen:
                    advantage[i] = [(a - mean) / spread for a in advantage[i]]
        k, h = config.advantage_mask_fraction, config.entropy_filter_fraction
        if config.quantile_scope == "batch":
            keep_a, keep_h = masks_of([s for row in deviation for s in row], k, h)
            lengths = [len(row) for row in deviation]
            keep_advantage = [keep_a[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(len(lengths))]
            keep_entropy = [keep_h[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(len(lengths))]
        else:
            keep_advantage, keep_entropy = zip(*(masks_of(row, k, h) for row in deviation), strict=True)
        if (skip := config.advantage_mask_skip) > 0:
            keep_a, _ = masks_of([s for row in deviation for s in row[skip:]], k, h)
            left = iter(keep_a)
            keep_advantage = [[True] * len(row[:skip]) + [next(left) for _ in row[skip:]] for row in deviation]
    else:
        advantage = []
        for s in samples:
            group = [other.score for other in samples if other.prompt_number == s.prompt_number]
            mean = sum(group) / len(group)
            spread = math.sqrt(sum((score - mean) ** 2 for score in group) / (len(group) - 1))
            advantage.append([(s.score - mean) / (spread + 1e-4)] * len(s.response))
        keep_advantage = keep_entropy = [[True] * len(s.response) for s in samples]

    # Policy.
    for rows in todo if train_policy else ():
        objective = torch.zeros((), dtype=torch.float64)
        num_tokens = sum(len(samples[row].response) for row in rows)
        for row in rows:
            logprob, entropy = logprob_entropy(policy, samples[row], config.temperature)
            length = len(samples[row].response)
            weight = 1 / (len(rows) * length) if config.loss_aggregation == "sequence-mean" else 1 / num_tokens
            for t in range(length):
                ratio = (logprob[t] - old[row][t]).exp()
                clipped = ratio.clamp(1 - config.epsilon, 1 + config.epsilon_high)
                surrogate = torch.minimum(ratio * advantage[row][t], clipped * advantage[row][t])
                difference = ref[row][t] - logprob[t]
                kl = difference.exp() - difference - 1
                if config.use_bias_correction_kl:
                    kl = kl * ratio
                objective = objective + weight * (
                    keep_advantage[row][t] * surrogate
                    + config.entropy_coef * keep_entropy[row][t] * entropy[t]
                    - config.beta * kl
                )
        step(optimizers[0], policy, -objective, config.max_grad_norm)


class Chance:
    """Remembers how the trainer dealt responses to critics and cut minibatches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.shares: list[list[int]] = []
        self.minibatches: list[list[int]] = []
        split, cut = asyppo.trainer.split_responses, asyppo.trainer.minibatches

        def remember_split(*arguments: Any) -> Tensor:
            share = split(*arguments)
            self.shares.append(share.tolist())
            return share

        def remember_minibatches(*arguments: Any) -> Any:
            for rows in cut(*arguments):
                self.minibatches.append(rows.tolist())
                yield rows

        monkeypatch.setattr(asyppo.trainer, "split_responses", remember_split)
        monkeypatch.setattr(asyppo.trainer, "minibatches", remember_minibatches)


def change(before: Any, after: Any) -> dict[str, Tensor]:
    """What training did to each weight."""
    return {
        name: (new - old).detach()
        for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True)
    }


def assert_same_change(before: Any, trainers: Any, restated: Any, learning_rate: float) -> None:
    """Compare what the trainer did to the weights with what the re-statement did."""
    got, expected = change(before, trainers), change(before, restated)
    for name in got:
        torch.testing.assert_close(
            got[name], expected[name], atol=2e-3 * learning_rate, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


SEED = 6  # of the responses
VARIATIONS: dict[str, dict[str, Any]] = {
    "asyppo": {},
    "three critics, a remainder": {"critic": {"num_critics": 3}},
    "one critic": {"critic": {"num_critics": 1}},
    "ppo": {"algorithm": "ppo"},
    "grpo": {"algorithm": "grpo"},
    "grpo with KL, minibatches": {"algorithm": "grpo", "beta": 0.1, "num_mini_batches": 3, "num_iterations": 2},
    "critics bootstrap": {"critic": {"value_lambda": 0.6}, "gamma": 0.9},
    "critics with minibatches": {"critic": {"num_iterations": 2, "num_mini_batches": 2, "value_lambda": 0.5}},
    "critics learn from all responses": {
        "critic": {"share": "all", "num_iterations": 2, "num_mini_batches": 2, "value_lambda": 0.5}
    },
    "warm-up of the critics": {"critic": {"warmup_steps": 1}},
    "reuse of the batch": {"num_iterations": 2, "num_mini_batches": 2},
    "KL to the reference": {"beta": 0.2, "num_iterations": 2},
    "plain k3": {"beta": 0.2, "num_iterations": 2, "use_bias_correction_kl": False},
    "no entropy": {"entropy_coef": 0.0},
    "token-mean": {"loss_aggregation": "token-mean", "num_mini_batches": 2},
    "not whitened, short λ": {"whiten": "none", "lam": 0.5},
    "whitened by group": {"whiten": "group"},
    "quantiles by sequence": {"quantile_scope": "sequence"},
    "a mask that leaves the first tokens": {"advantage_mask_skip": 2},
    "half masked": {"advantage_mask_fraction": 0.5, "entropy_filter_fraction": 0.5},
    "temperature, weight decay": {"temperature": 0.7, "weight_decay": 0.1},
}


@pytest.mark.parametrize(
    ("name", "stacked"),
    [(name, True) for name in VARIATIONS] + [(name, False) for name in VARIATIONS if "critics" in name],
)
def test_two_steps(
    name: str,
    stacked: bool,
    tiny_config: Callable[..., AsyPPOConfig],
    tiny_trainer: Callable[..., AsyPPOTrainer],
    scripted_sampler: Callable[..., Any],
    make_responses: Callable[..., list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After two steps of fixed responses and rewards, policy and critics have the same weights."""
    fields: dict[str, Any] = {"entropy_coef": 0.05, "num_generations": 4, "max_tokens_per_micro_batch": 40}
    config = tiny_config(**(fields | VARIATIONS[name]))
    config.critic.stacked = stacked
    responses = make_responses(config.prompts_per_step * config.num_generations, 8, seed=SEED)
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(len(responses), generator=generator).tolist()

    def reward(completions: list[str], **_: Any) -> list[float]:
        return scores

    sampler = scripted_sampler(responses)
    trainer = tiny_trainer(config, reward, sampler=sampler)
    # AdamW's epsilon makes small gradients, of which float32 knows few digits, matter little.
    for _, optimizer in trainer.trained().values():
        optimizer.param_groups[0]["eps"] = 1e-3
    before = copy.deepcopy(trainer.policy.model)
    critics_before = [] if trainer.critics is None else [copy.deepcopy(c) for c in trainer.critics.models]
    policy, critics = copy.deepcopy(before), copy.deepcopy(critics_before)
    optimizers = [
        torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, eps=1e-3),
        *(torch.optim.AdamW(c.parameters(), lr=config.critic.learning_rate, weight_decay=0, eps=1e-3) for c in critics),
    ]
    chance = Chance(monkeypatch)
    for number in (1, 2):
        chance.minibatches.clear()
        row = trainer.step(number).metrics
        samples = [
            Sample(sampler.calls[-1][i].tolist(), responses[i], i // config.num_generations, scores[i])
            for i in range(len(responses))
        ]
        restated_step(
            config,
            policy,
            critics,
            samples,
            chance.shares[-1] if chance.shares else None,
            list(chance.minibatches),
            optimizers,
            before,
            train_policy=number > config.critic.warmup_steps or not critics,
        )
        assert bool(chance.shares) == (bool(critics) and config.critic.share == "disjoint")
        assert row.get("actor/skipped_updates", 0) == row.get("critic/skipped_updates", 0) == 0
        updates = config.num_iterations * config.num_mini_batches * (number > config.critic.warmup_steps)
        assert len(chance.minibatches) == updates + len(critics) * (
            config.critic.num_iterations * config.critic.num_mini_batches
        )
    assert_same_change(before, trainer.policy.model, policy, config.learning_rate)
    for old, got, expected in zip(critics_before, trainer.critics.models if critics else (), critics, strict=True):
        assert_same_change(old, got, expected, config.critic.learning_rate)
    moved = max(float(c.abs().max()) for c in change(before, trainer.policy.model).values())
    assert moved > 0.1 * config.learning_rate
