"""Write the tables of docs/settings.md from the configuration's dataclasses: ``python docs/configuration_table.py``."""

from __future__ import annotations

import inspect
from pathlib import Path

from asyppo.cli.main import show
from asyppo.config import AsyPPOConfig
from asyppo.config.fields import Field, by_path, groups, may_change, stands_in

PAGE = Path(__file__).parent / "settings.md"
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
    mark = " ↻" if stands_in(field.path, may_change(AsyPPOConfig)) else ""
    narrow = field.values.startswith("one of") or field.facts.bounded
    values = f" ({_markdown(field.values)})" if narrow else ""
    return f"| `{field.path}`{mark} | `{default}` | {_markdown(field.doc)}{values} |"


def _markdown(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


def with_table(text: str) -> str:
    """Return a page's text with the tables between the two marks as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{PAGE} lacks the line {BEGIN.strip()} or {END.strip()}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
