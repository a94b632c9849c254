"""Settings below ``monte_carlo``: values from continuations."""

from __future__ import annotations

from dataclasses import dataclass, field

from asyppo.config.setting import setting


@dataclass
class MonteCarloConfig:
    """Values from continuations (``advantage_values: monte_carlo``, ``algorithm: vineppo``; VinePPO, arXiv
    2410.01679): from states that the responses go through, the policy goes on K times, and the mean of what it gets is
    the state's value. It costs so many times the sampling that it is a ceiling to hold critics against rather than a
    way to train: ``monte_carlo/tokens_per_response_token`` says how many."""

    num_continuations: int = setting(9, at_least=1)
    """K. The paper's: 9."""
    every: int = setting(8, at_least=1)
    """A state every so many tokens, from the first on. Tokens between two states share the first one's value and
    advantage. Our choice."""
    boundaries: list[str] = field(default_factory=list)
    """Texts after which a state begins, in place of ``every``: ``["\\n"]`` for VinePPO's steps of a solution."""

    @property
    def sparse(self) -> bool:
        """Whether an action may be of several tokens."""
        return self.every > 1 or bool(self.boundaries)
