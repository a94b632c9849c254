"""What reward functions log: TRL's ``log_metric`` and ``log_extra``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Logged:
    """What the functions have logged in a call."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Values of each metric; their mean is reported."""
    extra: dict[str, list[Any]] = field(default_factory=dict)
    """Values of each column, one a sample."""

    def log_metric(self, name: str, value: float) -> None:
        """Report ``value``, averaged with others of its name, as the step's metric ``name``."""
        self.metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Write ``values``, one a sample, to ``samples.jsonl``."""
        self.extra.setdefault(str(column), []).extend(map(as_json, values))

    def add(self, samples: Sequence[Logged]) -> None:
        """Take over what was logged in calls for one sample each; a column that one has not logged is None there."""
        for sample in samples:
            for name, values in sample.metrics.items():
                self.metrics.setdefault(name, []).extend(values)
        for column in dict.fromkeys(name for sample in samples for name in sample.extra):
            self.extra.setdefault(column, []).extend((sample.extra.get(column) or [None])[0] for sample in samples)

    def means(self) -> dict[str, float]:
        """Return the mean of each metric."""
        return {name: sum(values) / len(values) for name, values in self.metrics.items()}

    def fault(self, count: int) -> str | None:
        """Say which column has not ``count`` values, one a sample, or None."""
        for column, values in self.extra.items():
            if len(values) != count:
                return f"logged {len(values)} values of {column!r}, needs {count}, one for each sample"
        return None


def as_json(value: Any) -> Any:
    """Return ``value`` if JSON holds it, what a tensor or an array holds, or else its text."""
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return str(value)
    return value
