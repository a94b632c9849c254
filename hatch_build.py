"""What a build adds to ``pyproject.toml``: the address of the repository, and a readme whose links hold elsewhere.

The package index shows the readme beside none of the files that it links to. ``ASYPPO_REPOSITORY`` says where they are,
as ``https://github.com/OWNER/asyppo``; ``tools/release.sh`` sets it. Without it links stay as they are, which is right
for an installation from a clone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def absolute(text: str, repository: str, revision: str) -> str:
    """``text`` with the targets of its relative links as addresses: pages of a ``repository``, images as files."""

    def link(match: re.Match[str]) -> str:
        image, shown, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        return f"{image}[{shown}]({repository}/{'raw' if image else 'blob'}/{revision}/{target})"

    return LINK.sub(link, text)


class CustomMetadataHook(MetadataHookInterface):
    """``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set both, from README.md and the environment."""
        repository = os.environ.get("ASYPPO_REPOSITORY", "").rstrip("/")
        text = (Path(self.root) / "README.md").read_text()
        metadata["urls"] = {"Paper": "https://arxiv.org/abs/2510.01656"}
        if repository:
            tag = f"v{metadata['version']}"
            text = absolute(text, repository, tag)
            metadata["urls"] |= {
                "Repository": repository,
                "Issues": f"{repository}/issues",
                "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
                "Documentation": f"{repository}/tree/{tag}/docs",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
