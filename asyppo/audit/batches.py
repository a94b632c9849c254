"""What audits look at: batches that a trainer samples without learning from them, from seeds of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from asyppo.algorithm.options import AdvantageOptions
from asyppo.algorithm.signal import LearningSignal, Outcome
from asyppo.config import ConfigError
from asyppo.data.batch import Batch
from asyppo.distributed.processes import forked_rng
from asyppo.models.policy import TokenStats
from asyppo.rollout.collecting import Rollout, Sampled
from asyppo.run.progress import Timer
from asyppo.run.rng import seed_everything
from asyppo.trainer import AsyPPOTrainer

Split = Literal["eval", "train"]


@dataclass(frozen=True)
class Judged:
    """A batch, and what the algorithm makes of it."""

    sampled: Sampled
    """With the rewards that the algorithm sees."""
    old: TokenStats
    signal: LearningSignal


def audit_rollout(trainer: AsyPPOTrainer, split: Split, prompts: int, seed: int) -> Rollout:
    """Return what samples ``prompts`` prompts at a time of held-out rows or of training rows, with ``seed``, in the
    trainer's way but without dynamic sampling. Raises ConfigError where there are no such rows."""
    rows = trainer.eval_dataset if split == "eval" else trainer.train_dataset
    if not rows:
        raise ConfigError("--split: got eval, but the run holds no prompts out; needs train")
    config = replace(trainer.config, prompts_per_step=min(prompts, len(rows)), seed=seed, dynamic_sampling=False)
    return Rollout(trainer.sampler, trainer.tokenizer, trainer.reward_funcs, rows, config, trainer.device)


def sample(rollout: Rollout, number: int) -> Sampled:
    """Return the batch of that ``number``, from 1; it follows from the seed and the number."""
    with audit_randomness(rollout.config.seed, number):
        return rollout(number, Timer(rollout.device))


@contextmanager
def audit_randomness(seed: int, number: int) -> Iterator[None]:
    """Draw what is drawn inside from ``seed`` and ``number``; torch's generators are put back afterwards."""
    with forked_rng():
        seed_everything(seed * 1_000_003 + number)
        yield


Values = tuple[Tensor | None, Tensor | None]
"""What critics, or values of the algorithm's own, say of a batch, float32 [M, B, T], and which critic has learned from
each response, int64 [B]; None where there is none."""


def values_of(trainer: AsyPPOTrainer, batch: Batch, *, fit: bool, seed: int) -> Values:
    """Return what the trainer's critics say of a batch as they are or, with ``fit``, after they have learned from it,
    as they do in a step; they do not forget it."""
    if trainer.critics is None:
        return None if trainer.own_values is None else trainer.own_values(batch, trainer.tokenizer), None
    if not fit:
        return trainer.critics.values(batch, trainer.config.max_tokens_per_micro_batch), None
    generator = torch.Generator().manual_seed(seed)
    values, share, _ = trainer.learn_values(trainer.critics, batch, generator, Timer(trainer.device))
    return values, share


def signal_of(trainer: AsyPPOTrainer, sampled: Sampled, values: Values, seed: int) -> LearningSignal:
    """Return what the trainer's algorithm makes of a batch, given what critics say of it."""
    batch, (said, share), continued = sampled.batch, values, None
    if trainer.config.monte_carlo_values:
        continued, _ = trainer.continue_responses(sampled, seed, Timer(trainer.device))
    outcome = Outcome(batch.reward, batch.mask, batch.learned, batch.group, said, share, seed, continued)
    return trainer.advantage(outcome, AdvantageOptions.of(trainer.config))


def judged(trainer: AsyPPOTrainer, sampled: Sampled, *, fit: bool, seed: int) -> Judged:
    """Return a batch as a step would see it, and what the algorithm makes of it; ``fit`` as in ``values_of``."""
    batch, old = trainer.observe(sampled.batch)
    values = values_of(trainer, batch, fit=fit, seed=seed)
    sampled = replace(sampled, batch=replace(batch, hidden=None))
    return Judged(sampled, old, signal_of(trainer, sampled, values, seed))
