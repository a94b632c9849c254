"""The tables of the two READMEs: sections between markers, each written by the command that its marker names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import triton

README = Path(__file__).with_name("README.md")
KERNELS_README = Path(__file__).parents[2] / "kernels" / "README.md"


def write(path: Path, section: str, text: str) -> None:
    """Replace what stands between a section's markers."""
    before, _, after = _split(path, section)
    path.write_text(f"{before}\n{text}\n{after}")


def merged(path: Path, section: str, table: str, order: Sequence[str], stamp: str = "") -> str:
    """A table whose rows stand in the place of those of a section that begin with the same cell; the others stay.

    Rows are put in the ``order`` of their first cells; those whose first cell it does not hold are gone. Raises
    ValueError if others would stay in a section that does not begin with ``stamp``.
    """
    head, new = _parse(table)
    inside = _split(path, section)[1].strip()
    if not (set(order) <= set(new) or inside.startswith(stamp)):
        raise ValueError(f"{path.name}, {section}: its rows are not of {stamp!r}; run all of them")
    rows = _parse(inside)[1] | new
    return "\n".join([*head, *(row for key in order for row in rows.get(key, []))])


def version() -> str:
    """Triton's."""
    return f"Triton {triton.__version__}"


def _split(path: Path, section: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {section}: begin, written by python -m tests.ptx {section} -->", f"<!-- {section}: end -->"
    before, rest = path.read_text().split(begin)
    inside, after = rest.split(end)
    return before + begin, inside, end + after


def _parse(text: str) -> tuple[list[str], dict[str, list[str]]]:
    """(the two lines of a table's head, its rows by their first cell)."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows: dict[str, list[str]] = {}
    for line in lines[2:]:
        rows.setdefault(line.split(" | ")[0].strip("| `"), []).append(line)
    return lines[:2], rows
