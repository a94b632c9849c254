"""The version: the distribution's; of a checkout that is not installed, the one it would be built with."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("asyppo")
except PackageNotFoundError:
    __version__ = import_module("asyppo_kernels").__version__
