"""Sections of kernels/README.md that commands write, between markers that name the command."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parents[1] / "kernels" / "README.md"


def write(section: str, command: str, text: str, path: Path = README) -> None:
    """Replace what stands between a section's markers. Raises ValueError where they are missing."""
    begin, end = f"<!-- {section}: begin, written by {command} -->", f"<!-- {section}: end -->"
    before, rest = path.read_text().split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
