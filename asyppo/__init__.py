"""AsyPPO: a PPO trainer whose policy is guided by a few mini-critics (arXiv 2510.01656).

``from asyppo import AsyPPOTrainer, AsyPPOConfig, load_config``. Each is imported when it is first asked for, so that
``import asyppo`` and the command line's ``--help`` do without torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyppo.config import AsyPPOConfig, ConfigError, load_config
    from asyppo.trainer import AsyPPOTrainer

    __version__: str

_HOMES = {
    "AsyPPOConfig": "asyppo.config",
    "AsyPPOTrainer": "asyppo.trainer",
    "ConfigError": "asyppo.config",
    "load_config": "asyppo.config",
}

__all__ = ["AsyPPOConfig", "AsyPPOTrainer", "ConfigError", "__version__", "load_config"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The distribution's; of a checkout that is not installed, the one it would be built with."""
    try:
        return version("asyppo")
    except PackageNotFoundError:
        return import_module("asyppo_kernels").__version__
