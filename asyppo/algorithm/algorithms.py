"""The algorithms: what each needs of critics, and how it makes the learning signal. The one table of them.

An entry names its function rather than imports it, so that reading the table costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Algorithm:
    """An entry. One's own is an instance in a file of one's own, or a function alone, which has no critics."""

    advantage: str | Callable[..., Any]
    """``(Outcome, AdvantageOptions) -> LearningSignal``, or ``module:function`` of it."""
    critics: Literal["mini", "policy", "none"] = "none"
    """``mini``: ``critic.num_critics`` of them, from ``critic.model_name_or_path``. ``policy``: one, made from the
    policy's own checkpoint. ``none``: no critic."""
    values: str | Callable[..., Any] | None = None
    """Values of one's own in place of critics': ``(Batch, tokenizer) -> float32 [M, B, T]``, V_m at the position that
    predicts each token of the response grid, or ``module:function`` of it. None: critics', or none."""
    compares_group: bool = False
    """Whether it compares the responses of one prompt, which takes at least two."""
    monte_carlo: bool = False
    """Whether it takes its values from continuations, whatever ``advantage_values`` says."""
    scales_rewards: bool = False
    """Whether it reads ``scale_rewards``."""

    def num_critics(self, configured: int) -> int:
        """Return M, where the configuration asks for ``configured`` mini-critics."""
        return {"mini": configured, "policy": 1, "none": 0}[self.critics]


ALGORITHMS: dict[str, Algorithm] = {
    "asyppo": Algorithm("asyppo.algorithm.advantage:critics_advantage", critics="mini"),
    "ppo": Algorithm("asyppo.algorithm.advantage:critics_advantage", critics="policy"),
    "grpo": Algorithm("asyppo.algorithm.advantage:group_advantage", compares_group=True, scales_rewards=True),
    "rloo": Algorithm("asyppo.algorithm.advantage:leave_one_out_advantage", compares_group=True),
    "reinforce++": Algorithm("asyppo.algorithm.advantage:reward_to_go_advantage"),
    "vineppo": Algorithm("asyppo.algorithm.advantage:monte_carlo_advantage", monte_carlo=True),
}
