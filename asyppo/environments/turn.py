"""What is known of one turn of an episode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turn:
    """One turn of an episode; tokens are counted in the response."""

    start: int
    """Its first token."""
    end: int
    """The token after its last; the answer's first."""
    until: int
    """The token after the answer's last; ``end`` where there is none."""
    action: str
    calls: list[dict[str, Any]]
    """Name and arguments of each tool call."""
    observation: str | None
    """None: it was not answered."""
    reward: float
    failures: int
    timed_out: bool
