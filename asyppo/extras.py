"""What the distribution's extras bring, and what of it is missing."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version


def missing(extra: str) -> list[str]:
    """The requirements of an extra that are not installed, by name; of a checkout that is not installed, none."""
    try:
        listed = requires("asyppo") or []
    except PackageNotFoundError:
        return []
    found = []
    for requirement in listed:
        name = re.match(r"[\w.-]+", requirement)
        if name and re.search(rf"""extra == ['"]{extra}['"]""", requirement) and "platform_system" not in requirement:
            try:
                version(name[0])
            except PackageNotFoundError:
                found.append(name[0])
    return found


def advice(extra: str) -> str:
    """One line that says what is missing of an extra, and how to get it; empty if nothing is."""
    names = missing(extra)
    return f"not installed: {', '.join(names)}. They come with pip install 'asyppo[{extra}]'" if names else ""
