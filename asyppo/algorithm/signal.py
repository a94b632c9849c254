"""What an algorithm is given and what it returns: the types that advantages pass through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from asyppo.algorithm.options import AdvantageOptions
from asyppo.algorithm.turns import Turns


@dataclass(frozen=True)
class StateValues:
    """Values of some of the states that responses go through, however they were found."""

    value: Tensor
    """float32 [B, T]: at the token that is drawn in the state; 0 elsewhere."""
    states: Tensor
    """bool [B, T]: where there is a state; the first token of each response is."""


@dataclass(frozen=True)
class Outcome:
    """What a step knows of its B responses when it makes the advantage."""

    reward: Tensor
    """float32 [B, T]: a response's score at its last token, rewards and penalties of tokens at their own."""
    mask: Tensor
    """bool [B, T]: the response tokens, but for those of an environment."""
    learned: Tensor
    """bool [B, T]: those among them that losses count."""
    group: Tensor
    """int64 [B]: which prompt a response answers."""
    values: Tensor | None = None
    """float32 [M, B, T]: every critic's value at the position that predicts each token; None without critics."""
    share: Tensor | None = None
    """int64 [B]: the critic that learned from a response; None: all did, or there is none."""
    seed: int = 0
    """Of the chance that an algorithm may take, such as a random mask's: of the run's seed and the step, so the same on
    every rank and in a resumed run."""
    monte_carlo: StateValues | None = None
    """Values from continuations, where ``advantage_values`` or the algorithm asks for them."""
    turns: Turns | None = None
    """Where an environment answered; None: nowhere."""


@dataclass(frozen=True)
class LearningSignal:
    """What the policy update reads; everything on the response grid [B, T]."""

    advantage: Tensor
    """float32 [B, T]: whitened, not masked."""
    advantage_keep: Tensor
    """bool [B, T]: I^A, False on padding."""
    entropy_keep: Tensor
    """bool [B, T]: I^H, False on padding."""
    raw_advantage: Tensor
    """float32 [B, T]: before whitening."""
    returns: Tensor
    """float32 [B, T]: the λ-return that critics learn; of the mean value where λ < 1."""
    value: Tensor
    """float32 [B, T]: V̄, the mean over critics; also in the states after turns, at the first token of an answer."""
    values: Tensor
    """float32 [M, B, T]: each critic's own; M = 0 without critics."""
    std: Tensor
    """float32 [B, T]: σ, the population standard deviation over critics."""
    low: Tensor
    """float32 scalar: advantages of tokens with a σ below it are masked."""
    high: Tensor
    """float32 scalar: tokens with a σ above it get no entropy bonus."""


Advantage = Callable[[Outcome, AdvantageOptions], LearningSignal]
"""From rewards, groups and, if there are critics, values to what the policy learns from."""
