"""LoRA adapters on a causal language model, by peft through transformers' own integration.

The model stays a ``PreTrainedModel``: its layers get adapters in place, ``save_pretrained`` writes the adapters alone,
and ``disable_adapters`` gives back the model under them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from asyppo.config import ConfigError


def base_of_adapter(path: str) -> str | None:
    """Return the model under the adapter that ``path`` (directory or hub name) holds, None if it holds a model."""
    found = find_adapter_config_file(path)
    if found is None or (Path(path) / "config.json").exists():
        return None
    return json.loads(Path(found).read_text())["base_model_name_or_path"]


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether adapters are trained rather than the model's own weights."""
    return getattr(model, "_hf_peft_config_loaded", False)


def without_peft(model: Any) -> PreTrainedModel:
    """Return the model in peft's ``PeftModel``, whose layers have the adapters, as transformers' own integration would
    have left it; they are trained. Raises ConfigError for adapters that are not in layers, and for the head's."""
    if model.active_peft_config.is_prompt_learning:
        kind = type(model.active_peft_config).__name__
        raise ConfigError(f"policy: got a PeftModel with {kind}, needs adapters in the layers, such as LoRA's")
    inner: Any = model.get_base_model()
    head = inner.get_output_embeddings()
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise ConfigError("policy: got a PeftModel that adapts or saves the head, needs layers below it")
    inner._hf_peft_config_loaded = True
    inner.peft_config = model.peft_config
    inner.set_adapter(inner.active_adapters())  # one that was loaded is frozen
    return inner


def add_lora(model: PreTrainedModel, *, r: int, alpha: int, target_modules: list[str] | None) -> None:
    """Put trainable adapters of rank ``r`` (arXiv 2106.09685) on the linear layers that ``target_modules`` names, and
    freeze everything else. None: all linear layers but the head. A new adapter changes nothing: its B is 0.

    Raises ConfigError for a name that no layer has, for the head, whose weight goes into the fused ops as it is, and
    where transformers takes no adapters of the peft that is installed.
    """
    import peft

    try:
        model.add_adapter(
            peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=target_modules or "all-linear", task_type="CAUSAL_LM")
        )
    except ValueError as error:
        said = " ".join(str(error).split())
        if "target" in said.lower():  # every such message of peft names them so
            raise ConfigError(f"policy.lora_target_modules: {said}") from error
        versions = f"transformers {transformers.__version__} with peft {peft.__version__}"
        raise ConfigError(f"policy.use_peft: {versions} adds no adapters: {said}") from error
    if hasattr(model.get_output_embeddings(), "base_layer"):
        raise ConfigError(
            f"policy.lora_target_modules: got {target_modules}, which names the head; needs layers below it"
        )
