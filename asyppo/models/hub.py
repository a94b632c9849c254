"""Models from directories and from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from asyppo.config import ConfigError
from asyppo.models.adapters import base_of_adapter


def load_pretrained(
    auto_class: Any,
    path: str,
    device: torch.device,
    *,
    setting: str,
    trust_remote_code: bool = False,
    config_attributes: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """``from_pretrained`` in float32 (masters of whatever is computed in), from safetensors, with Liger's kernels
    where the model is on a GPU and Liger knows it; and its report of missing weights. ``config_attributes`` are set on
    the model's config, ``kwargs`` go to its ``from_pretrained``. Raises ConfigError, which names ``setting``, where
    ``path`` came from, and the path."""
    if path.startswith((".", "/", "~")) and not Path(path).exists():  # no name on the hub
        raise ConfigError(f"{setting}: cannot load {path!r}: there is no such directory")
    if list(Path(path).glob("*.bin")) and not list(Path(path).glob("*.safetensors")):
        raise ConfigError(
            f"{setting}: {path!r} has its weights as pickle files, which can run code when they are loaded; "
            "needs safetensors, as save_pretrained writes them"
        )
    try:
        base = base_of_adapter(path)
        if base is not None and auto_class is not AutoModelForCausalLM:
            raise ConfigError(f"{setting}: {path!r} holds an adapter, a critic needs a model")
        config = AutoConfig.from_pretrained(base or path, trust_remote_code=trust_remote_code, **kwargs)
        for name, value in (config_attributes or {}).items():
            setattr(config, name, value)
        model, report = auto_class.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{setting}: cannot load {path!r}: {' '.join(str(error).split())}") from error
    model = model.to(device)
    if device.type == "cuda":
        use_liger_kernels(model)
    return model, report


def use_liger_kernels(model: PreTrainedModel) -> None:
    """Replace parts of ``model`` by Liger's where it knows the architecture; they run on GPUs only."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    if model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
        _apply_liger_kernel_to_instance(model=model)
