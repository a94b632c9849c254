"""Settings below ``warm_start``."""

from __future__ import annotations

from dataclasses import dataclass, field

from asyppo.config.setting import setting


@dataclass
class ModelShape:
    """Shape of a small Qwen3 made by the warm start."""

    hidden_size: int = setting(128, at_least=1)
    """Width."""
    num_hidden_layers: int = setting(3, at_least=1)
    """Depth."""
    num_attention_heads: int = setting(4, at_least=1)
    """Query heads."""
    num_key_value_heads: int = setting(2, at_least=1)
    """Key and value heads."""
    intermediate_size: int = setting(384, at_least=1)
    """Width of the MLP."""


@dataclass
class WarmStartConfig:
    """A small policy and a smaller critic made on the spot: a Qwen3 from a config, a tokenizer of its own, and
    supervised steps on worked solutions with mistakes in them, so that it knows the format and starts out fallible.
    The result is cached, and loaded by ``from_pretrained`` like any other model. For the tasks ``chain_sum`` and
    ``gcd``; beside an ``environment`` that ships, from episodes with it."""

    policy: ModelShape = field(default_factory=ModelShape)
    """Shape of the policy."""
    critic: ModelShape = field(default_factory=lambda: ModelShape(64, 2, 4, 2, 192))
    """Shape of the checkpoint the critics start from."""
    steps: int = setting(300, at_least=1)
    """Supervised optimizer steps."""
    batch_size: int = setting(256, at_least=1)
    """Solutions a step."""
    learning_rate: float = setting(3e-3, above=0)
    """AdamW's peak learning rate, reached after 30 steps and decaying to a tenth."""
    noise: float = setting(0.05, at_least=0, at_most=1, noun="probability")
    """Probability that a line of a solution is wrong, and everything after it follows from the wrong value."""
    guess: float = setting(0.5, at_least=0, at_most=1, noun="probability")
    """Probability that a solution leaves the working out and guesses."""
    wrong_rule: float = setting(0.0, at_least=0, at_most=1, noun="probability")
    """Probability that a solution with working keeps to a wrong rule from its first line to its last, so that its
    mistakes are no improbable tokens: in ``chain_sum``, a 9 is taken for a 1 of the other sign."""
    seed: int = 0
    """Seed of weights and noise."""
    cache_dir: str = setting("~/.cache/asyppo", may_change=True)
    """Where the result is kept, under a name made of every setting it depends on."""
