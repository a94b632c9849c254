"""Settings below ``environment``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from asyppo.config.setting import setting


@dataclass
class EnvironmentConfig:
    """What answers the policy's turns, so that a response has several: an environment, or tools. See
    ``docs/environments.md``."""

    name: str | None = setting(None, elsewhere=("environment_factory",))
    """``calculator``, ``grid_world``, ``word_guessing`` or ``second_try``, which ship; or one's own, ``module:name`` or
    ``path.py:name`` of a class, or of a function that makes one: of the text protocol (``reset`` and ``step``), or in
    TRL's form (``reset``, public methods as tools, and perhaps ``get_reward``). None: there is none, and a response is
    one turn."""
    params: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments it is made with, such as ``{slip: 0.2}``."""
    tools: list[str] = field(default_factory=list)
    """Functions that the policy may call, ``module:function`` or ``path.py:function``, with type hints and docstrings
    that say what they do, as TRL's ``tools``."""
    max_turns: int = setting(8, at_least=1, elsewhere=("max_tool_calling_iterations", "max_assistant_turns"))
    """Turns of the policy; an episode that has not ended by then is cut off, after the last answer."""
    max_turn_length: int | None = setting(None, at_least=1)
    """Longest turn, in tokens; one that is cut off is not answered, and ends its episode. None: what
    ``max_completion_length``, which counts the tokens of both sides, leaves."""
    timeout: float | None = setting(60.0, above=0, noun="number of seconds")
    """Seconds that an answer may take. Instead of one that takes longer the policy sees an error, and
    ``environment/timeouts`` counts it; an environment, unlike a tool, is not called again, so its episode ends.
    None: no limit."""
    waves: int = setting(1, at_least=1)
    """Parts that the episodes of a step are divided into: while the sampler writes for one, the environments of the
    others answer. 2 hides answers that take about as long as a turn, and has the sampler write half as many at once."""
    max_parallel: int = setting(16, at_least=1)
    """Answers that are made at once, each in a thread. 1, with no ``timeout``: one after another, in the trainer's."""

    @property
    def given(self) -> bool:
        """Whether there is an environment or a tool."""
        return self.name is not None or bool(self.tools)
