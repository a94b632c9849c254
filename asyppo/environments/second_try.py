"""A second try at a task of reasoning-gym, after hearing that the first was wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


class SecondTry:
    """An action is an answer, at best in ``<answer>…</answer>``. One that the task's own score calls right ends the
    episode with reward 1, or with ``later`` if it was not the first; a wrong one is answered by ``wrong`` until
    ``tries`` are over.

    For rows of any task of reasoning-gym. Nothing in it is left to chance.
    """

    def __init__(self, tries: int = 2, later: float = 1.0):
        if tries < 1:
            raise ValueError(f"tries: got {tries}, needs at least 1")
        self.tries, self.later = tries, later

    def reset(self, entry: Mapping[str, Any]) -> str:
        """Begin with the question of ``entry``, which is the prompt's."""
        self.entry, self.tried = entry, 0
        return ""

    def step(self, action: str) -> tuple[str, float, bool]:
        """Score an answer."""
        from reasoning_gym import get_score_answer_fn

        tagged = re.findall(r"<answer>(.*?)</answer>", action, re.DOTALL)
        score = get_score_answer_fn(self.entry["metadata"]["source_dataset"])
        self.tried += 1
        if score((tagged[-1] if tagged else action).strip(), self.entry) >= 1:
            return "", 1.0 if self.tried == 1 else self.later, True
        return "wrong\n", 0.0, self.tried >= self.tries
