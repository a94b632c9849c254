"""Rewards of episodes: what reward functions give, and what the environment gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerState

from asyppo.data.rows import Row
from asyppo.rewards.computing import Rewards, compute_rewards
from asyppo.rewards.function import RewardFunction
from asyppo.rollout.environments.playing import Played


def episode_rewards(
    funcs: Sequence[RewardFunction],
    rows: Sequence[Row],
    played: Sequence[Played],
    names: Mapping[str | None, str],
    *,
    weights: Sequence[float] | None = None,
    step: int | None = None,
    trainer_state: TrainerState | None = None,
) -> Rewards:
    """Return the rewards of episodes: of reward functions, which see the environments, too, as ``environments``; and of
    the environments, with weight 1, each under its name of ``names`` (by the column ``environment``; None: of all).
    Raises RewardError."""
    rewards = Rewards({}, [0.0] * len(rows), {})
    if funcs:
        rewards = compute_rewards(
            funcs,
            rows,
            [one.completion for one in played],
            [one.response.tokens.tolist() for one in played],
            weights=weights,
            step=step,
            trainer_state=trainer_state,
            environments=[one.environment for one in played],
        )
    of_environments: dict[str, list[float | None]] = {}
    for name in dict.fromkeys(names.values()):
        of_environments[name] = [
            one.reward if names.get(row.get("environment") if None not in names else None) == name else None
            for row, one in zip(rows, played, strict=True)
        ]
    total = [_total(given, one) for given, one in zip(rewards.total, played, strict=True)]
    return Rewards(rewards.by_function | of_environments, total, rewards.timeouts, rewards.logged)


def _total(given: float | Tensor, played: Played) -> Any:
    """Of an episode, what reward functions gave and what its environment did, at its tokens: float32 [tokens]."""
    total = played.response.reward.clone()
    if isinstance(given, Tensor):
        return total + given
    total[-1] += given
    return total
