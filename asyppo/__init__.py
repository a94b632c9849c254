"""AsyPPO: a PPO trainer whose policy is guided by a few mini-critics (arXiv 2510.01656)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyppo.config import AsyPPOConfig
    from asyppo.trainer import AsyPPOTrainer

__all__ = ["AsyPPOConfig", "AsyPPOTrainer"]

_PLACES = {"AsyPPOConfig": "asyppo.config", "AsyPPOTrainer": "asyppo.trainer"}


def __getattr__(name: str) -> Any:
    # Imported when asked for: the trainer brings transformers along, and `asyppo --help` answers without it.
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
