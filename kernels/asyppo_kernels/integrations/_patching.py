"""Attributes of another package, replaced and put back, if it is of the version that was tested."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any


def check_version(package: str, tested: str) -> None:
    """ImportError unless ``package`` is installed in the version ``tested``, of which later parts may be left out."""
    try:
        found = version(package)
    except PackageNotFoundError:
        raise ImportError(f"{package}: not installed, needs {tested}: pip install '{package}=={tested}.*'") from None
    parts = tested.split(".")
    if found.split(".")[: len(parts)] != parts:
        raise ImportError(
            f"{package}: got {found}, needs {tested}, since what is replaced in it is private and changes: "
            f"pip install '{package}=={tested}.*'"
        )


class Patches:
    """What has been replaced, in the order in which it was."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._replaced)

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name``, which is there, to ``value``."""
        self._replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back."""
        while self._replaced:
            setattr(*self._replaced.pop())
