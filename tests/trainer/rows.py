"""Rows of data sets, and files of them, as tests write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from asyppo.config import DataConfig
from asyppo.data import checks
from asyppo.data.checks import Checks, Fit
from asyppo.data.rows import Rows


def fitting(rows: Any, name: str, tokenizer: Any, config: DataConfig, limit: int, **more: Any) -> Rows:
    """Those that fit ``limit`` tokens."""
    needs = more.pop("needs", ())
    return checks.fitting(rows, name, Checks(config, Fit(tokenizer, limit, **more), needs))


def jsonl(path: Path, *rows: Any) -> str:
    """Write rows; text is a line as it stands."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def numbered(count: int, **columns: Any) -> list[dict[str, Any]]:
    """Rows with prompts p0, p1, … and answers 0, 1, …."""
    return [{"prompt": f"p{i}", "answer": i, **columns} for i in range(count)]
