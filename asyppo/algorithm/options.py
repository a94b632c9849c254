"""The settings that the algorithm's functions read, under the names that they have in the configuration.

``of`` takes the configuration; this is the one place where its fields meet the functions. What the ops call them stands
at the calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class AdvantageOptions:
    """Of advantages and masks."""

    gamma: float = 1.0
    lam: float = 0.95
    length_adaptive_alpha: float | None = None
    value_lambda: float = 1.0
    whiten: Literal["none", "batch", "group"] = "batch"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    advantage_values: Literal["after", "before", "cross_fit", "monte_carlo"] = "after"
    advantage_mask: Literal["sigma", "random", "none"] = "sigma"
    advantage_mask_fraction: float = 0.2
    advantage_mask_skip: int = 0
    entropy_filter_fraction: float = 0.2
    quantile_scope: Literal["batch", "sequence", "position"] = "batch"
    environment_credit: Literal["keep", "drop"] = "keep"

    @classmethod
    def of(cls, config: Any) -> AdvantageOptions:
        """Return those of a configuration."""
        return _options(cls, config, value_lambda=config.critic.value_lambda)


@dataclass(frozen=True)
class PolicyLossOptions:
    """Of the policy's loss."""

    epsilon: float = 0.2
    epsilon_high: float = 0.28
    delta: float | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    use_bias_correction_kl: bool = True

    @classmethod
    def of(cls, config: Any) -> PolicyLossOptions:
        """Return those of a configuration; the KL penalty is in the loss unless it is in the reward."""
        return _options(cls, config, kl_coef=config.kl_in_loss)


@dataclass(frozen=True)
class ShapingOptions:
    """Of the penalties in the reward."""

    max_completion_length: int
    overlong_buffer_len: int = 0
    overlong_penalty_factor: float = 1.0
    use_kl_in_reward: bool = False
    beta: float = 0.0

    @classmethod
    def of(cls, config: Any) -> ShapingOptions:
        """Return those of a configuration."""
        return _options(cls, config)


def _options(cls: Any, config: Any, **others: Any) -> Any:
    """An instance whose fields are the configuration's of the same names, but for ``others``."""
    return cls(**{name: others[name] if name in others else getattr(config, name) for name in cls.__dataclass_fields__})
