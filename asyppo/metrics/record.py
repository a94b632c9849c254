"""What a step leaves behind: metrics and samples are read off it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from asyppo.algorithm.signal import LearningSignal
from asyppo.data.batch import Batch
from asyppo.environments.turn import Turn
from asyppo.models.policy import TokenStats
from asyppo.rewards.computing import Rewards


@dataclass(frozen=True)
class StepRecord:
    """What a step has sampled, and what it has made of it."""

    number: int
    """The step, from 1."""
    batch: Batch
    """With the rewards that the algorithm saw."""
    rewards: Rewards
    """By function, as they came."""
    old: TokenStats
    """Of the policy that sampled, as the trainer computes it; outside of ``known``, what is nearest to that."""
    known: Tensor
    """bool [B, T]: response tokens whose ``old`` is of the policy that sampled, and not the sampler's own log-prob and
    the entropy of a policy that has been updated since."""
    signal: LearningSignal
    log_ratio: Tensor
    """float32 [B, T]: log π/π_old of each token at its last visit; zeros where the policy was not updated."""
    turns: Sequence[Sequence[Turn]] = ()
    """Of each response, its turns; none without an environment."""
    gamma: float = 1.0
    """Discount of a step."""
