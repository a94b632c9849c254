"""Settings below ``eval``."""

from __future__ import annotations

from dataclasses import dataclass

from asyppo.config.setting import setting


@dataclass
class EvalConfig:
    """Accuracy on the held-out prompts, before the first step, after the last and in between."""

    on_start: bool = setting(True, elsewhere=("eval_on_start",))
    """Evaluate before the first step."""
    every: int = setting(0, at_least=0, elsewhere=("eval_steps",))
    """Also evaluate every n steps; 0: only before, if ``eval.on_start``, and after."""
    num_generations: int = setting(4, at_least=1)
    """Samples a prompt."""
    temperature: float = setting(1.0, at_least=0)
    """Sampling temperature of the evaluation; 0 takes the likeliest token each time."""
    min_gain: float | None = None
    """Fail the run (exit status 1) when the accuracy rises by less than this fraction. None asks nothing."""
