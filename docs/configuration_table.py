"""Write the README's table of settings from the configuration's dataclasses: ``python docs/configuration_table.py``."""

from __future__ import annotations

import inspect
from pathlib import Path

from asyppo.cli.main import show
from asyppo.config import AsyPPOConfig
from asyppo.config.fields import Field, by_path, groups

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- settings: begin, written by docs/configuration_table.py -->\n", "<!-- settings: end -->\n"


def table() -> str:
    """Return the settings as Markdown, a table for each branch of the tree."""
    lines = []
    for path, leaves in groups(AsyPPOConfig).items():
        branch = by_path(AsyPPOConfig)[path].branch if path else None
        if branch is not None:
            lines += [f"**`{path}`** {_markdown(inspect.getdoc(branch) or '')}", ""]
        lines += ["| setting | default | |", "|---|---|---|", *map(_row, leaves), ""]
    return "\n".join(lines)


def _row(field: Field) -> str:
    default = "null" if field.branch else show(field.default)
    choices = f" ({_markdown(field.type)})" if field.type.startswith("one of") else ""
    return f"| `{field.path}` | `{default}` | {_markdown(field.doc)}{choices} |"


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


def with_table(text: str) -> str:
    """Return a README's text with the table between the two marks as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{README} lacks the line {BEGIN.strip()} or {END.strip()}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
