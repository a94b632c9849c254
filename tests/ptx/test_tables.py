"""The tables that commands write between markers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ptx import tables

PAGE = """Before.
<!-- check: begin, written by python -m tests.ptx check -->
Triton 3.7.1. 0 of 3 cases.

| op | n |
|---|---|
| `a` | 1 |
| `a` | 2 |
| `gone` | 3 |
| `b` | 4 |
<!-- check: end -->
After.
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(PAGE)
    return path


def test_rows_of_an_op_take_the_place_of_its_own(page: Path) -> None:
    table = "| op | n | m |\n|---|---|---|\n| `a` | 5 | 6 |"
    text = tables.merged(page, "check", table, ["new", "b", "a"], "Triton 3.7.1")
    assert text.splitlines() == ["| op | n | m |", "|---|---|---|", "| `b` | 4 |", "| `a` | 5 | 6 |"]


def test_rows_of_two_versions_of_triton_are_not_mixed(page: Path) -> None:
    table = "| op | n |\n|---|---|\n| `a` | 5 |"
    with pytest.raises(ValueError, match="run all of them"):
        tables.merged(page, "check", table, ["a", "b"], "Triton 3.8.0")
    assert tables.merged(page, "check", table, ["a"], "Triton 3.8.0") == table


def test_what_stands_between_the_markers_is_replaced(page: Path) -> None:
    tables.write(page, "check", "New.")
    assert page.read_text() == "Before.\n" + "\n".join([PAGE.splitlines()[1], "New.", *PAGE.splitlines()[-2:], ""])
