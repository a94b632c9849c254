"""AsyPPO: a PPO trainer whose policy is guided by a few mini-critics (arXiv 2510.01656).

``from asyppo import AsyPPOTrainer, AsyPPOConfig, load_config``. Each is imported when it is first asked for, so that
``import asyppo`` and the command line's ``--help`` do without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyppo.config import AsyPPOConfig, ConfigError, load_config
    from asyppo.publish import push_to_hub
    from asyppo.trainer import AsyPPOTrainer

    __version__: str

_HOMES = {
    "AsyPPOConfig": "asyppo.config",
    "AsyPPOTrainer": "asyppo.trainer",
    "ConfigError": "asyppo.config",
    "__version__": "asyppo.version",
    "load_config": "asyppo.config",
    "push_to_hub": "asyppo.publish",
}

__all__ = ["AsyPPOConfig", "AsyPPOTrainer", "ConfigError", "__version__", "load_config", "push_to_hub"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            return getattr(import_module(_HOMES[name]), name)
        except ModuleNotFoundError as error:
            from asyppo.extras import advice

            if not (said := advice("train")):
                raise
            raise ImportError(f"asyppo.{name}: {said}") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
