"""docs/scaling.md: its tables are what its script writes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "scaling.py"


@pytest.mark.slow
def test_the_tables_are_those_of_the_script() -> None:
    spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    scaling = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = scaling  # dataclasses look there
    spec.loader.exec_module(scaling)
    text = scaling.PAGE.read_text()
    assert scaling.with_tables(text) == text
