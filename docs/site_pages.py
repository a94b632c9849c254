"""Gather the pages of the documentation's site in build/pages: ``python docs/site_pages.py``; `make docs` does it.

The pages are the repository's Markdown files, wherever they are. There a link names a file relative to the file that it
stands in, so that it holds where the repository is read; here each is turned round to where the site has that file: a
page, a picture, or, of any other text, a page that shows it. Needs nothing but Python.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "pages"
OUTSIDE = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "kernels/README.md",
    "bench/README.md",
    "bench/results/README.md",
)
"""Pages outside docs/."""
PICTURES = {".png", ".svg"}
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".css": "css"}
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^ *```.*?^ *```$", re.M | re.S)


def name(path: str) -> str:
    """Return where the site has the file ``path`` of the repository."""
    if path == "README.md":
        return "index.md"
    picture = Path(path).suffix in PICTURES
    if path in OUTSIDE or (path.startswith("docs/") and (picture or path.endswith(".md"))):
        return path.removeprefix("docs/")
    return path if picture else f"source/{path}.md"


def links(text: str, path: str) -> Iterator[tuple[re.Match[str], str]]:
    """Yield the links of the page ``path`` to files, each with the file's path in the repository.

    What looks like a link in a fence is none.
    """
    fences = [match.span() for match in FENCE.finditer(text)]
    for match in LINK.finditer(text):
        if "://" not in match[2] and not any(start <= match.start() < end for start, end in fences):
            yield match, posixpath.normpath(posixpath.join(posixpath.dirname(path), match[2]))


def page(text: str, path: str) -> str:
    """Return the text of the page ``path`` with its links as they are in the site."""
    here, parts, end = posixpath.dirname(name(path)), [], 0
    for match, linked in links(text, path):
        parts += [text[end : match.start()], match[1], os.path.relpath(name(linked), here or "."), match[3]]
        end = match.end()
    return "".join([*parts, text[end:]])


def gather() -> None:
    """Write every page, and what pages link to, to ``PAGES``."""
    shutil.rmtree(PAGES, ignore_errors=True)
    pages = {path: ROOT / path for path in OUTSIDE}
    pages |= {str(file.relative_to(ROOT)): file for file in sorted((ROOT / "docs").rglob("*.md"))}
    for path, file in pages.items():
        text = file.read_text()
        _write(name(path), page(text, path))
        for _, linked in links(text, path):
            source, target = ROOT / linked, name(linked)
            if linked in pages or not source.is_file():
                continue  # a link to nothing is an error of the build
            if source.suffix in PICTURES:
                (PAGES / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, PAGES / target)
            else:
                language = LANGUAGES.get(source.suffix, "")
                _write(target, f"# {source.name}\n\n`{linked}`\n\n``````{language}\n{source.read_text()}``````\n")
    shutil.copy(ROOT / "docs" / "site.css", PAGES)


def _write(target: str, text: str) -> None:
    file = PAGES / target
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


if __name__ == "__main__":
    gather()
