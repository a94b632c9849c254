"""Settings: what they are, and where they come from."""

from asyppo.config.schema import (
    AsyPPOConfig,
    ConfigError,
    CriticConfig,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    ModelShape,
    PolicyConfig,
    TaskConfig,
    WarmStartConfig,
)

__all__ = [
    "AsyPPOConfig",
    "ConfigError",
    "CriticConfig",
    "DataConfig",
    "DistributedConfig",
    "EvalConfig",
    "ModelShape",
    "PolicyConfig",
    "TaskConfig",
    "WarmStartConfig",
]
