"""Critics against the truth: what the policy really gets from states that its responses go through."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyppo.audit.batches import Judged, Split, audit_randomness, audit_rollout, judged, sample
from asyppo.audit.estimates import (
    States,
    by_fifth,
    by_fraction,
    by_token,
    in_bin,
    intervals,
    of_all,
    rank_intervals,
)
from asyppo.config import ConfigError
from asyppo.distributed.processes import first_of_ranks
from asyppo.metrics.record import StepRecord
from asyppo.metrics.samples import rounded, sample_rows
from asyppo.rollout.continuations import state_at
from asyppo.run.progress import ProgressDisplay
from asyppo.run.signals import StopSignals
from asyppo.trainer import AsyPPOTrainer

PER_RESPONSE = 4
"""States of a response in the mean."""
SHOWN = 32
"""Responses with their tokens in the results, for the token view."""
LEAST = 8
"""States of which there are results."""


@dataclass(frozen=True)
class ValueAudit:
    """What an audit found."""

    states: States
    batch: Judged
    rows: np.ndarray
    """int64 [S, 2]: response and position of each state."""
    settings: dict[str, Any]
    tokens: int
    """Sampled for the truth."""
    stopped_by: int | None
    """The signal that ended it early."""

    def results(self, resamples: int = 400) -> dict[str, Any]:
        """Return every number with its interval, a bootstrap's of so many ``resamples``, and the tables by position,
        value and σ, as JSON can hold them."""
        states = self.states
        tables = {
            "fraction of the response": by_fraction(states),
            "token": by_token(states),
            "value": by_fifth(states.value),
        }
        if states.values.shape[1] > 1:
            tables["sigma"] = by_fifth(states.std)
        ranks = {f"value/{name}": number for name, number in rank_intervals(states, resamples=resamples).items()}
        return {
            "states": len(states),
            "prompts": len(np.unique(states.prompt)),
            "continuations": states.returns.shape[1],
            "tokens": self.tokens,
            "critics": states.values.shape[1],
            "numbers": intervals(states, of_all, resamples=resamples) | ranks,
            "tables": {name: self._table(*bins, resamples) for name, bins in tables.items()},
        }

    def samples(self, trainer: AsyPPOTrainer, step: int) -> list[dict[str, Any]]:
        """Return some of the audited responses as rows of ``samples.jsonl``, with ``truth`` and its standard error
        ``truth_se`` at each token whose state was audited."""
        batch = self.batch.sampled.batch
        zeros = torch.zeros_like(batch.reward)
        record = StepRecord(
            step, batch, self.batch.sampled.rewards, self.batch.old, batch.mask, self.batch.signal, zeros
        )
        responses = list(dict.fromkeys(sorted(self.rows[:, 0].tolist())))
        responses = responses[:: math.ceil(len(responses) / SHOWN)]
        rows = sample_rows(record, len(responses), trainer.tokenizer, responses)
        errors = np.sqrt(self.states.noise)
        for b, row in zip(responses, rows, strict=True):
            row |= {"split": "audit", "truth": [None] * len(row["tokens"]), "truth_se": [None] * len(row["tokens"])}
            for s in np.flatnonzero(self.rows[:, 0] == b).tolist():
                t = int(self.rows[s, 1])
                row["truth"][t], row["truth_se"][t] = rounded(float(self.states.truth[s])), rounded(float(errors[s]))
        return rows

    def _table(self, names: Sequence[str], which: np.ndarray, resamples: int) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "states": int((which == i).sum()),
                **intervals(self.states.at(which == i), in_bin, resamples=resamples),
            }
            for i, name in enumerate(names)
            if (which == i).any()
        ]


def audit_values(
    trainer: AsyPPOTrainer,
    *,
    states: int = 512,
    continuations: int = 16,
    prompts: int | None = None,
    split: Split | None = None,
    fit: bool = False,
    seed: int = 0,
    budget: int | None = None,
) -> ValueAudit:
    """Hold the values of the trainer's critics, as they are, against Monte Carlo estimates of the truth.

    One batch of G responses to each of ``prompts`` prompts (None: as many as a step has) of ``split`` (None: held-out
    rows where there are any) is sampled and judged as a step would; with ``fit``, critics learn from it first.
    ``states`` states are drawn among the tokens of some of the responses, ``PER_RESPONSE`` of a response in the mean,
    every token with the same chance; so numbers are means over tokens. A state is that in which a token was drawn, so
    that none has ended. From each, and from the one behind its token, the policy goes on ``continuations`` times, with
    the tokens that ``max_completion_length`` leaves; what is cut off there gets the reward that the reward functions
    give it. Behind a last token there is nothing: its value is 0.

    States are worked on in an order of chance. After ``budget`` tokens, or a signal, what is done is taken for the
    whole. Everything follows from ``seed``. Several ranks divide the sampling. Raises ConfigError for numbers that are
    too small.
    """
    for name, got, least in (
        ("states", states, LEAST),
        ("continuations", continuations, 4),
        ("prompts", prompts, 2),
        ("budget", budget, 1),
    ):
        if got is not None and got < least:
            raise ConfigError(f"--{name}: got {got}, needs at least {least}")
    split = split or ("eval" if trainer.eval_dataset else "train")
    rollout = audit_rollout(trainer, split, prompts or trainer.config.prompts_per_step, seed)
    batch = judged(trainer, sample(rollout, 1), fit=fit, seed=seed)
    chosen = choose(batch.sampled.batch.on_host[1], batch.sampled.batch.group.tolist(), states, seed)
    reward = batch.sampled.batch.reward.cpu()
    returns, following, tokens, done = [], [], 0, 0
    at_once = max(16, rollout.config.generation_batch_size // (2 * continuations))
    with (
        StopSignals("finishing this part, and writing what there is") as signals,
        ProgressDisplay("states", len(chosen)) as progress,
    ):
        received = None
        while done < len(chosen) and received is None and (budget is None or tokens < budget):
            part = chosen[done : done + at_once].tolist()
            here = [state_at(batch.sampled, b, t) for b, t in part]
            last = [t + 1 == batch.sampled.batch.on_host[1][b] for b, t in part]
            behind = [state_at(batch.sampled, b, t + 1) for (b, t), ends in zip(part, last, strict=True) if not ends]
            with audit_randomness(seed, 2 + done):
                continued = trainer.continuations()([*here, *behind], continuations)
            returns.append(continued.returns[: len(part)])
            following.append(_following(continued.returns[len(part) :], part, last, reward, trainer.config.gamma))
            tokens += continued.tokens
            done += len(part)
            progress.advance(f"{tokens:,} tokens", count=len(part))
            received = first_of_ranks(signals.received)
    return ValueAudit(
        _states(batch, chosen[:done], torch.cat(returns), torch.cat(following)),
        batch,
        chosen[:done],
        {"states": states, "continuations": continuations, "split": split, "fit": fit, "seed": seed, "budget": budget},
        tokens,
        received,
    )


def choose(lengths: Sequence[int], groups: Sequence[int], states: int, seed: int) -> np.ndarray:
    """Return int64 [S, 2]: response and position of ``states`` tokens, or of all if there are fewer, in an order of
    chance.

    They are drawn among the tokens of so many responses that each has ``PER_RESPONSE`` in the mean, taken evenly from
    the groups: the first response of each, then the second, and so on.
    """
    generator = np.random.default_rng(seed)
    turn: dict[int, int] = {}
    order = []
    for b, group in enumerate(groups):
        order.append((turn.setdefault(group, 0), group, b))
        turn[group] += 1
    responses = [b for _, _, b in sorted(order)]
    count, tokens = 0, 0
    while count < len(responses) and (count < math.ceil(states / PER_RESPONSE) or tokens < states):
        tokens += lengths[responses[count]]
        count += 1
    places = np.array([(b, t) for b in responses[:count] for t in range(lengths[b])], dtype=np.int64)
    return generator.permutation(places)[:states]


def _following(
    drawn: Tensor, part: Sequence[Sequence[int]], last: Sequence[bool], reward: Tensor, gamma: float
) -> Tensor:
    """float32 [s, K]: the tokens' own rewards, and what the states behind them come to, of which those that are there
    are in ``drawn``."""
    own = torch.tensor([float(reward[b, t]) for b, t in part])[:, None]
    behind = torch.zeros(len(part), drawn.shape[1])
    behind[~torch.tensor(last)] = drawn
    return own + gamma * behind


def _states(batch: Judged, chosen: np.ndarray, returns: Tensor, following: Tensor) -> States:
    """What the batch says of the chosen states, and what continuations came to."""
    b, t = torch.from_numpy(chosen).unbind(1)
    signal = batch.signal

    def at(grid: Tensor) -> np.ndarray:
        return grid.cpu()[..., b, t].double().numpy()

    return States(
        prompt=batch.sampled.batch.group.cpu()[b].numpy(),
        position=chosen[:, 1],
        length=np.array(batch.sampled.batch.on_host[1])[chosen[:, 0]],
        value=at(signal.value),
        values=at(signal.values).T if len(signal.values) else np.zeros((len(chosen), 0)),
        std=at(signal.std),
        returns=returns.double().numpy(),
        next_returns=following.double().numpy(),
        advantage=at(signal.raw_advantage),
        logprob=at(batch.old.logprob),
        advantage_keep=at(signal.advantage_keep) > 0,
        entropy_keep=at(signal.entropy_keep) > 0,
    )
