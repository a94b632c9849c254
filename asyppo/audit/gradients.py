"""Estimators of the policy's gradient against a reference of many batches, at weights that stay as they are.

With g_1 … g_n the gradients of one estimator on n batches and R the mean of the reference's N, on batches of their own:

- the cosine of one batch, the mean of g_i · R / (|g_i| |E r|), is what an estimator is worth in a step: R is unbiased,
  and independent of g_i;
- the cosine of the expectation, E g · E r / (|E g| |E r|), is what is left of it without noise: the estimator's bias.

|E g|^2 is estimated without bias by the mean of g_i · g_j over pairs i < j, as from two halves of the batches, but with
every division into two at once. The sum over pairs grows with the batches, by g_j · (g_1 + … + g_(j-1)), so that of
each estimator one vector is kept, and not n.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from asyppo.algorithm.advantage import leave_one_out_advantage
from asyppo.algorithm.options import AdvantageOptions, PolicyLossOptions
from asyppo.algorithm.policy_losses import PolicyTargets
from asyppo.algorithm.signal import LearningSignal, Outcome
from asyppo.algorithm.student import quantile
from asyppo.algorithm.weights import token_weights
from asyppo.audit.batches import Split, Values, audit_rollout, sample, signal_of, values_of
from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.data.batch import Batch, micro_batches
from asyppo.distributed.processes import world_size
from asyppo.models.policy import Objective
from asyppo.rollout.collecting import Sampled
from asyppo.run.progress import ProgressDisplay
from asyppo.run.signals import StopSignals
from asyppo.trainer import AsyPPOTrainer

REFERENCES = {
    "loss": "leave-one-out, tokens weighed as the run's loss does",
    "reward": "leave-one-out, tokens weighed alike: the gradient of the expected reward",
}
"""What arms are held against, by name."""
CRITIC_STEPS = 8
LEAST = 4
"""Batches of which there are results."""


@dataclass
class Gradients:
    """What is kept of the gradients of one estimator: their sum, and a few numbers of each."""

    total: Tensor | None = None
    """float32 [P]."""
    squares: list[float] = field(default_factory=list)
    """|g_i|^2."""
    before: list[float] = field(default_factory=list)
    """g_i · (g_1 + … + g_(i-1)) / (i - 1), from the second on."""
    along: dict[str, list[float]] = field(default_factory=dict)
    """g_i · R, by the name of the reference."""

    def add(self, gradient: Tensor, references: Mapping[str, Tensor] | None = None) -> None:
        """Count one more batch's ``gradient`` [P]; ``references`` [P] are the R by name."""
        if self.total is None:
            self.total = torch.zeros_like(gradient)
        else:
            self.before.append(dot(gradient, self.total) / len(self.squares))
        for name, reference in (references or {}).items():
            self.along.setdefault(name, []).append(dot(gradient, reference))
        self.squares.append(dot(gradient, gradient))
        self.total += gradient

    def __len__(self) -> int:
        return len(self.squares)

    @property
    def mean(self) -> Tensor:
        """float32 [P]."""
        assert self.total is not None
        return self.total / len(self)

    @property
    def square(self) -> float:
        """|E g|^2, without bias: the mean of g_i · g_j over pairs. It may come out below 0."""
        pairs = len(self) * (len(self) - 1) / 2
        return sum(i * product for i, product in enumerate(self.before, start=1)) / pairs if pairs else math.nan

    @property
    def noise(self) -> float:
        """E |g - E g|^2 / |E g|^2 of one batch; NaN where |E g|^2 is not above 0."""
        mean = sum(self.squares) / len(self)
        return (mean - self.square) / self.square if self.square > 0 else math.nan


def dot(a: Tensor, b: Tensor) -> float:
    """Return the product of float32 vectors; sums of a million terms keep six digits in pieces."""
    return float(sum((x.double() @ y.double() for x, y in zip(a.split(1 << 20), b.split(1 << 20), strict=True))))


def each_cosine(gradients: Gradients, name: str, reference: Gradients) -> list[float]:
    """Return g_i · R / (|g_i| |E r|) of each batch, r being those of the ``reference`` of that ``name``."""
    length = math.sqrt(max(reference.square, 0.0))
    return [
        p / (math.sqrt(s) * length) if s > 0 and length > 0 else math.nan
        for p, s in zip(gradients.along[name], gradients.squares, strict=True)
    ]


def cosines(gradients: Gradients, name: str, reference: Gradients) -> dict[str, dict[str, float]]:
    """Return the cosine of one batch's gradient with the expected reference, that of the expected gradient with it, and
    the noise, each with the 95 % interval over batches (Student's t; of the two others by the delta method).

    The reference's own noise is not in the intervals: it is common to all arms.
    """
    count, length = len(gradients), math.sqrt(max(reference.square, 0.0))
    each, along = each_cosine(gradients, name, reference), gradients.along[name]
    # The relative influence of a batch on p and on |E g|^2: of the second half, which has enough batches before it.
    late = range(max(1, count // 2), count)
    mean_along, square = sum(along) / count, gradients.square
    expected = math.nan
    influence: list[float] = []
    if square > 0 and length > 0:
        expected = mean_along / (math.sqrt(square) * length)
        influence = [
            expected * (along[i] / mean_along - gradients.before[i - 1] / square) if mean_along else math.nan
            for i in late
        ]
    mean_square = sum(gradients.squares) / count
    noise = [
        gradients.squares[i] / square - 2 * mean_square * gradients.before[i - 1] / square**2
        if square > 0
        else math.nan
        for i in late
    ]
    return {
        "cosine": _interval(sum(each) / count, each, count),
        "cosine_of_expectation": _interval(expected, influence, count),
        "noise": _interval(gradients.noise, noise, count),
    }


def _interval(value: float, influence: Sequence[float], count: int) -> dict[str, float]:
    """``value`` and its interval, given what ``count`` batches add to it, or some of them."""
    there = [x for x in influence if math.isfinite(x)]
    if len(there) < 2 or len(there) < len(influence):
        return {"value": value, "low": math.nan, "high": math.nan}
    mean = sum(there) / len(there)
    spread = math.sqrt(sum((x - mean) ** 2 for x in there) / (len(there) - 1) / count)
    half = quantile(0.975, len(there) - 1) * spread
    return {"value": value, "low": value - half, "high": value + half}


@dataclass(frozen=True)
class GradientAudit:
    """What an audit found: of each arm and each reference, the gradients' sums and numbers."""

    arms: dict[str, Gradients]
    references: dict[str, Gradients]
    settings: dict[str, Any]
    stopped_by: int | None
    """The signal that ended it early."""

    def results(self) -> dict[str, Any]:
        """Return cosines, differences from the first arm on the same batches, and noise, with intervals; of the
        references how many batches they are of, and which share of |R|^2 is that of the expectation."""
        first = next(iter(self.arms.values()))
        arms = {}
        for name, gradients in self.arms.items():
            found: dict[str, Any] = {}
            for of, reference in self.references.items():
                found[of] = cosines(gradients, of, reference)
                ours, theirs = each_cosine(gradients, of, reference), each_cosine(first, of, reference)
                apart = [a - b for a, b in zip(ours, theirs, strict=True)]
                found[of]["minus_first"] = _interval(sum(apart) / len(apart), apart, len(apart))
            noise = found["loss"].pop("noise")
            del found["reward"]["noise"]
            arms[name] = found | {"noise": noise, "norm": math.sqrt(sum(gradients.squares) / len(gradients))}
        references = {
            name: {"batches": len(r), "certain": r.square / dot(r.mean, r.mean)} for name, r in self.references.items()
        }
        return {"batches": len(first), "arms": arms, "references": references}


def audit_gradients(
    trainer: AsyPPOTrainer,
    arms: Mapping[str, AsyPPOConfig],
    build: Callable[[AsyPPOConfig], AsyPPOTrainer],
    *,
    batches: int = 16,
    reference_batches: int = 32,
    critic_steps: int = CRITIC_STEPS,
    split: Split = "train",
    seed: int = 0,
) -> GradientAudit:
    """Hold the policy gradient that each of ``arms``, settings by name, would take a step with against references.

    Gradients are of the surrogate at π = π_old, over a whole batch as one minibatch, without entropy bonus, KL penalty
    and importance weights, at the weights of ``trainer``, which stay. References are leave-one-out REINFORCE,
    ``REFERENCES``. All arms see the same batches, each of G responses to as many prompts as a step of the run has, from
    ``seed``; those of the references, of the critics' learning and of the arms have different prompts as far as there
    are enough. Critics score a batch as in a step: where ``advantage_values`` has them learn from it first they do, and
    forget it again. Arms with the trainer's own critics take those; for others ``build`` makes a trainer, whose critics
    learn ``critic_steps`` batches while the policy stays. A signal ends it with what there is. Raises ConfigError, also
    for several processes.
    """
    for name, got, least in (("batches", batches, LEAST), ("reference_batches", reference_batches, LEAST)):
        if got < least:
            raise ConfigError(f"--{name}: got {got}, needs at least {least}")
    if critic_steps < 0:
        raise ConfigError(f"--critic_steps: got {critic_steps}, needs at least 0")
    if world_size() > 1:
        raise ConfigError(f"audit: got {world_size()} processes, needs one for gradients: they are held whole")
    judges = {name: _judge(trainer, config, build) for name, config in arms.items()}
    judges = _sharing_critics(judges)
    kinds = list({id(judge.critics): judge for judge in judges.values() if judge.critics is not None}.values())
    new = [judge for judge in kinds if judge.critics is not trainer.critics]
    rollout = audit_rollout(trainer, split, trainer.config.prompts_per_step, seed)
    references = {name: Gradients() for name in REFERENCES}
    found = {name: Gradients() for name in arms}
    critic_steps = critic_steps if new else 0
    numbers = iter(range(1, sys.maxsize))
    with (
        StopSignals("finishing this batch, and writing what there is") as signals,
        ProgressDisplay("batches", critic_steps + reference_batches + batches) as progress,
    ):

        def drawn(count: int, note: str) -> Iterator[tuple[int, Sampled]]:
            for number in itertools.islice(numbers, count):
                if signals.received is not None:
                    return
                yield seed * 1_000_003 + number, sample(rollout, number)
                progress.advance(note)

        for own_seed, sampled in drawn(critic_steps, "critics learn"):
            for judge in new:
                values_of(judge, judge.observe(sampled.batch)[0], fit=True, seed=own_seed)
        for _, sampled in drawn(reference_batches, "reference"):
            for name, gradients in references.items():
                gradients.add(_reference_gradient(trainer, sampled.batch, name))
        means = {name: gradients.mean for name, gradients in references.items() if len(gradients)}
        for own_seed, sampled in drawn(batches, "arms"):
            _add_batch(found, judges, sampled, means, own_seed)
    settings = {
        "batches": batches,
        "reference_batches": reference_batches,
        "critic_steps": critic_steps,
        "split": split,
        "seed": seed,
    }
    return GradientAudit(found, references, settings, signals.received)


def _judge(
    trainer: AsyPPOTrainer, config: AsyPPOConfig, build: Callable[[AsyPPOConfig], AsyPPOTrainer]
) -> AsyPPOTrainer:
    """A trainer of the arm's settings at the weights of ``trainer``: with its models, or, where it has other critics,
    with its own of these and a copy of the policy."""
    ours, theirs = trainer.config.resolved_algorithm.critics, config.resolved_algorithm.critics
    if theirs == "none" or (ours == theirs and config.critic == trainer.config.critic):
        return trainer.with_settings(config)
    made = build(config)
    # Without what lies beside the parameters, such as the scales of weights in 4 bits, which are of the same model.
    made.policy.load_state_dict(dict(trainer.policy.named_parameters()), strict=False)
    made.sampler = made.rollout.sampler = trainer.sampler
    return made


def _sharing_critics(judges: Mapping[str, AsyPPOTrainer]) -> dict[str, AsyPPOTrainer]:
    """Let arms with equal critics have those of the first such arm: they learn once."""
    shared: dict[str, AsyPPOTrainer] = {}
    for name, judge in judges.items():
        alike = (
            other
            for other in shared.values()
            if other.critics is not None
            and judge.critics is not None
            and other.config.critic == judge.config.critic
            and other.config.resolved_algorithm.critics == judge.config.resolved_algorithm.critics
        )
        other = next(alike, None)
        shared[name] = judge if other is None else other.with_settings(judge.config)
    return shared


def _add_batch(
    found: Mapping[str, Gradients],
    judges: Mapping[str, AsyPPOTrainer],
    sampled: Sampled,
    references: Mapping[str, Tensor],
    seed: int,
) -> None:
    """Add each arm's gradient on a batch. Critics that score alike do so once."""
    scored: dict[tuple[int, int, bool], Values] = {}
    for name, judge in judges.items():
        batch, old = judge.observe(sampled.batch)
        fit = judge.config.advantage_values in ("after", "cross_fit")
        key = id(judge.critics), id(judge.own_values), fit
        if key not in scored:
            with _unlearned(judge):
                scored[key] = values_of(judge, batch, fit=fit, seed=seed)
        signal = signal_of(judge, replace(sampled, batch=batch), scored[key], seed)
        weight = token_weights(batch.learned, torch.arange(len(batch)).to(judge.device), judge.config.loss_aggregation)
        found[name].add(surrogate_gradient(judge, batch, old.logprob, signal, weight), references)


@contextmanager
def _unlearned(trainer: AsyPPOTrainer) -> Iterator[None]:
    """Let critics forget what they learn inside: put weights and optimizer back."""
    critics, optimizer = trainer.critics, trainer.critic_optimizer
    if critics is None or optimizer is None:
        yield
        return
    weights, moments = copy.deepcopy(critics.state_dict()), copy.deepcopy(optimizer.adamw.state_dict())
    yield
    critics.load_state_dict(weights)
    optimizer.adamw.load_state_dict(moments)


def _reference_gradient(trainer: AsyPPOTrainer, sampled: Batch, name: str) -> Tensor:
    """Leave-one-out REINFORCE's, with the tokens' weights that the reference of that ``name`` has."""
    batch, old = trainer.observe(sampled)
    outcome = Outcome(batch.reward, batch.mask, batch.learned, batch.group)
    signal = leave_one_out_advantage(outcome, AdvantageOptions.of(trainer.config))
    if name == "reward":
        weight = batch.mask.float() / len(batch)
    else:
        everything = torch.arange(len(batch)).to(trainer.device)
        weight = token_weights(batch.learned, everything, trainer.config.loss_aggregation)
    return surrogate_gradient(trainer, batch, old.logprob, signal, weight, plain=True)


def surrogate_gradient(
    trainer: AsyPPOTrainer,
    batch: Batch,
    old_logprob: Tensor,
    signal: LearningSignal,
    weight: Tensor,
    *,
    plain: bool = False,
) -> Tensor:
    """Return the gradient of the surrogate alone, float32 [P] in the order of the policy's trained parameters, given
    the weights [B, T] of tokens; ``plain``: of PPO's, whatever the run's. No gradient is left behind."""
    policy = trainer.policy
    targets = PolicyTargets(old_logprob, signal.advantage, weight, signal.advantage_keep, signal.entropy_keep)
    options = replace(PolicyLossOptions.of(trainer.config), entropy_coef=0.0, kl_coef=0.0)
    objective = Objective(targets, options, None if plain else trainer.surrogate)
    policy.zero_grad(set_to_none=True)
    rows = torch.arange(len(batch))
    for micro in micro_batches(
        batch, rows, trainer.config.max_tokens_per_micro_batch, packed=policy.packs, shared=policy.shares
    ):
        policy(micro, replace(objective, targets=targets.at(micro.grid))).loss.backward()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
    policy.zero_grad(set_to_none=True)
    return gradient
