"""griffe's extension for the site: docstrings read in an editor first, and so use ``::`` before an indented block."""

from __future__ import annotations

import re
from typing import Any

import griffe


class IndentedBlocks(griffe.Extension):
    """Takes the second colon of ``::`` away; Markdown needs none before an indented block."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of each object that is read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"::(?=\n\n {4})", ":", obj.docstring.value)
