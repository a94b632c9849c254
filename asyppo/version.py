"""The version: the distribution's; of a checkout that is not installed, the one it would be built with."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


def _of_the_checkout() -> str:
    """What ``asyppo_kernels`` says, which is not imported, since that imports torch."""
    spec = find_spec("asyppo_kernels")
    assert spec is not None
    assert spec.origin is not None
    found = re.search(r'^__version__ = "([^"]+)"', Path(spec.origin).read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


try:
    __version__ = version("asyppo")
except PackageNotFoundError:
    __version__ = _of_the_checkout()
