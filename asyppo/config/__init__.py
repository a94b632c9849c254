"""Settings: what they are, and where they come from."""

from asyppo.config.errors import ConfigError
from asyppo.config.files import load_config
from asyppo.config.schema import (
    AsyPPOConfig,
    CriticConfig,
    DataConfig,
    DistributedConfig,
    EnvironmentConfig,
    EvalConfig,
    ModelShape,
    MonteCarloConfig,
    PolicyConfig,
    SideConfig,
    TaskConfig,
    VLLMConfig,
    WarmStartConfig,
)

__all__ = [
    "AsyPPOConfig",
    "ConfigError",
    "CriticConfig",
    "DataConfig",
    "DistributedConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "ModelShape",
    "MonteCarloConfig",
    "PolicyConfig",
    "SideConfig",
    "TaskConfig",
    "VLLMConfig",
    "WarmStartConfig",
    "load_config",
]
