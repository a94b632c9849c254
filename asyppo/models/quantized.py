"""What bitsandbytes keeps in fewer bits."""

from __future__ import annotations

from importlib.util import find_spec

from asyppo.config import AsyPPOConfig, ConfigError


def check_bitsandbytes(config: AsyPPOConfig) -> None:
    """Raise ConfigError if a setting needs bitsandbytes, and it is not installed."""
    needing = {
        "optim": (config.optim, "adamw_8bit"),
        "critic.optim": (config.critic.optim if config.num_critics else None, "adamw_8bit"),
    }
    for name, (got, value) in needing.items():
        if got == value and find_spec("bitsandbytes") is None:
            raise ConfigError(
                f"{name}: got {got!r}, needs bitsandbytes, which is not installed: pip install 'asyppo[bitsandbytes]'"
            )
