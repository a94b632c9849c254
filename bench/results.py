"""Result files: one JSON file a run, the same shape on every device."""

from __future__ import annotations

import json
import math
import re
import site
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.environment import ROOT, slug

RESULTS = ROOT / "bench" / "results"
SCHEMA = 1

Result = dict[str, Any]
Row = dict[str, Any]


def default_path(result: Result) -> Path:
    """``bench/results/2026-01-31-nvidia-h200-0a1b2c3.json``; a quick run goes where git does not look."""
    folder = ROOT / ".benchmarks" if result["scale"] == "quick" else RESULTS
    commit = (result["commit"] or "unknown")[:7]
    return folder / f"{result['date'][:10]}-{slug(result['device']['name'])}-{commit}.json"


def save(result: Result, path: Path) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n")


def load(path: Path) -> Result:
    """Read a result file; ValueError if it is not one of this version."""
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: not a result file of version {SCHEMA}")
    return result


def carry_on(result: Result, path: Path) -> None:
    """Put the cases and sweeps of a file before those of ``result``; ValueError if they were not made as these are."""
    before = load(path)
    for name in ("device", "versions", "commit", "scale"):
        if before[name] != result[name]:
            raise ValueError(f"{path.name}: {name}: got {before[name]!r}, needs {result[name]!r}; write another file")
    for part in ("cases", "sweeps"):
        result[part] = [*before[part], *result[part]]


def rows(result: Result) -> Iterator[tuple[dict[str, Any], Row]]:
    """All (case, row) of a result, those of the sweeps left out."""
    for case in result["cases"]:
        for row in case["rows"]:
            yield case, row


def clean(text: str, most: int = 300) -> str:
    """First lines of a message, without the paths of this machine."""
    text = " ".join(str(text).split())
    for place in {str(ROOT), sys.prefix, sys.base_prefix, str(Path.home()), *site.getsitepackages()} - {"/"}:
        text = text.replace(place, "…")
    text = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+([\w.+-]+)", r"…/\1", text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _finite(value: Any) -> Any:
    """JSON has no infinity: an error that is infinite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
