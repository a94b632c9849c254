"""griffe's extension for the site. Docstrings are written to be read in an editor, and Markdown misreads two things."""

from __future__ import annotations

import re
from typing import Any

import griffe


class AsMarkdown(griffe.Extension):
    """Writes docstrings as Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of each object that is read."""
        if obj.docstring is not None:
            # It needs no second colon before an indented block.
            text = re.sub(r"::(?=\n\n {4})", ":", obj.docstring.value)
            # It takes the shape in "weight: [N]: w" for the definition of a link.
            obj.docstring.value = re.sub(r"(?<=: )\[([^\]\n]*)\]:", r"\\[\1]:", text)
