"""LoRA adapters on a causal language model, by peft through transformers' own integration.

The model stays a ``PreTrainedModel``: its layers get adapters in place, ``save_pretrained`` writes the adapters alone,
and ``disable_adapters`` gives back the model under them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from asyppo.config import ConfigError
from asyppo.models.quantized import is_in_4_bits, widened


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


def plain_names(model: PreTrainedModel) -> dict[str, str]:
    """Return for each parameter of ``model`` the name that it has without adapters; for a part of an adapter, that of
    the weight under it."""
    places = {
        f"{place}.{part}.": place
        for place, layer in model.named_modules(remove_duplicate=False)
        for part in getattr(layer, "adapter_layer_names", ())
    }
    found = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        place = next((place for part, place in places.items() if name.startswith(part)), None)
        found[name] = name.replace(".base_layer.", ".") if place is None else f"{place}.weight"
    return found


@torch.no_grad()
def merged(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield ``weights`` of ``model`` by the names that they have without its adapters, those under adapters with these
    added, in float32, whether kept in 4 bits or not. A weight's adapters have to be whole when it comes. Raises
    ConfigError for adapters that do more than add to a weight."""
    plain, layers = plain_names(model), dict(model.named_modules(remove_duplicate=False))
    for name, weight in weights:
        module = layers.get(name.removesuffix(".weight"))
        if module is not None and is_in_4_bits(module):
            weight = widened(module.weight)  # what is kept of it comes without its scales
        place, base, last = name.rpartition(".base_layer.")
        if base and last == "weight":
            yield plain[name], weight.float() + _added(place, layers[place])
        elif base or plain[name] == name:
            yield plain[name], weight


def _added(place: str, layer: Any) -> Tensor:
    """What the active adapters add to the weight of ``layer``."""
    held = {adapter for part in layer.adapter_layer_names for adapter in getattr(layer, part, ())}
    total: Any = 0
    for adapter in (a for a in layer.active_adapters if a in held):
        if not hasattr(layer, "get_delta_weight") or getattr(layer, "lora_variant", {}).get(adapter) is not None:
            raise ConfigError(
                f"policy: adapter {adapter!r} of {place} does more than add to a weight; a sampler with weights of its "
                "own needs plain LoRA"
            )
        total = total + layer.get_delta_weight(adapter).float()
    return total
