"""Models from directories and from the hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from asyppo.config import ConfigError
from asyppo.distributed.processes import is_main
from asyppo.models.adapters import base_of_adapter, has_adapters
from asyppo.models.quantized import options_of_4_bits, widened
from asyppo.models.shards import note_files, weights_stood_in_for, why_whole

log = logging.getLogger("asyppo")

VALUE_HEAD_NAME = "score"
"""Of transformers' token classifiers of the families whose backbones adapters share."""

_LOADING = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


def load_config(path: str, *, setting: str, trust_remote_code: bool = False, **kwargs: Any) -> PretrainedConfig:
    """Return the configuration of the model that ``path``, a directory or a hub name, holds or has adapters for.
    ``kwargs`` go to its ``from_pretrained``. Raises ConfigError, which names ``setting`` and the path."""
    if path.startswith((".", "/", "~")) and not Path(path).exists():  # no name on the hub
        raise ConfigError(f"{setting}: cannot load {path!r}: there is no such directory")
    base = None
    try:
        base = base_of_adapter(path)
        return AutoConfig.from_pretrained(base or path, trust_remote_code=trust_remote_code, **kwargs)
    except _LOADING as error:
        what = f"{path!r}" if base is None else f"the model {base!r} under the adapter {path!r}"
        remedy = ""
        if base is not None and not Path(base).exists():
            remedy = (
                f"; there is no such directory here, in {Path.cwd()}: needs base_model_name_or_path in its "
                "adapter_config.json to be a whole path, or the directory that it is relative to as the current one"
            )
        raise ConfigError(f"{setting}: cannot load {what}: {' '.join(str(error).split())}{remedy}") from error


def load_pretrained(
    auto_class: Any,
    path: str,
    device: torch.device,
    *,
    setting: str,
    trust_remote_code: bool = False,
    config_attributes: dict[str, Any] | None = None,
    in_4_bits: torch.dtype | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """``from_pretrained`` in float32 (masters of whatever is computed in), from safetensors, with Liger's kernels
    where the model is on a GPU and Liger knows it; and its report of missing weights. ``config_attributes`` are set on
    the model's config, ``kwargs`` go to its ``from_pretrained``. ``in_4_bits``: keep the linear layers but the head in
    4 bits, to compute in this precision. Raises ConfigError, which names ``setting``, where ``path`` came from, and the
    path; also for weights that are not finite.

    On the meta ``device`` weights are left to ``asyppo.models.shards.read_shards`` where that can read them; where it
    cannot, the model is loaded whole, on the CPU."""
    config = load_config(path, setting=setting, trust_remote_code=trust_remote_code, **kwargs)
    source_dtype = config.dtype
    if list(Path(path).glob("*.bin")) and not list(Path(path).glob("*.safetensors")):
        raise ConfigError(
            f"{setting}: {path!r} has its weights as pickle files, which can run code when they are loaded; "
            "needs safetensors, as save_pretrained writes them"
        )
    if auto_class is not AutoModelForCausalLM and base_of_adapter(path) is not None:
        raise ConfigError(f"{setting}: {path!r} holds an adapter, a critic needs a model")
    options: dict[str, Any] = {
        "config": config,
        "dtype": torch.float32,
        "use_safetensors": True,
        "output_loading_info": True,
        "trust_remote_code": trust_remote_code,
    }
    if in_4_bits is not None:
        skip = None if auto_class is AutoModelForCausalLM else [VALUE_HEAD_NAME]
        options |= options_of_4_bits(device, in_4_bits, skip)
    try:
        for name, value in (config_attributes or {}).items():
            setattr(config, name, value)
        if device.type == "meta":
            reason = why_whole(config)
            if reason is None:
                reason, model, report = _without_weights(auto_class, path, setting, options)
            if reason is None:
                remember_dtype(model, source_dtype)
                return model, report
            if is_main():
                log.warning("%s: every process loads all of %r before it is sharded: %s", setting, path, reason)
            device = torch.device("cpu")
        model, report = auto_class.from_pretrained(path, **options)
    except _LOADING as error:
        raise ConfigError(f"{setting}: cannot load {path!r}: {' '.join(str(error).split())}") from error
    check_finite(model, setting, path)
    remember_dtype(model, source_dtype)
    model = model.to(device)
    if device.type == "cuda":
        use_liger_kernels(model)
    return model, report


def _without_weights(
    auto_class: Any, path: str, setting: str, options: dict[str, Any]
) -> tuple[str | None, PreTrainedModel, dict[str, Any]]:
    """Return why a model has to be loaded whole (None: it has not), the model on the meta device, with its adapters if
    ``path`` holds some, and the report of missing weights."""
    base = base_of_adapter(path) or path
    model, report = auto_class.from_pretrained(base, **options, device_map="meta")
    reason = note_files(model, base, setting, set(report["missing_keys"]))
    if reason is None and base != path:
        with weights_stood_in_for(model):
            model.load_adapter(path)
    return reason, model, report


def check_finite(model: nn.Module, setting: str, path: str | None = None) -> None:
    """Raise ConfigError if a weight of ``model``, which came from ``path``, is not finite."""
    bad = [
        name
        for name, weight in model.named_parameters()
        if not bool(torch.isfinite(widened(weight).detach().sum(dtype=torch.float64)))
    ]
    if not bad:
        return
    file = _file_of(path, bad[0]) if path is not None else None
    where = f" in {file}" if file is not None else f" of {path!r}" if path is not None else ""
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    raise ConfigError(f"{setting}: the weight {bad[0]}{where}{more} has NaN or infinity in it; needs finite weights")


def _file_of(path: str, parameter: str) -> Path | None:
    """The file in ``path`` that holds ``parameter``, whose name there may have another beginning."""
    tail = parameter.partition(".")[2] or parameter
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            if any(name == parameter or name.endswith(tail) for name in weights.keys()):  # noqa: SIM118
                return file
    return None


SaveDtype = Literal["auto", "float32", "bfloat16"]

_SOURCE_DTYPE = "_asyppo_source_dtype"


def remember_dtype(model: nn.Module, dtype: torch.dtype | str | None) -> None:
    """Note that the weights of ``model`` are stored in ``dtype`` where they come from."""
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if isinstance(dtype, torch.dtype):
        setattr(model, _SOURCE_DTYPE, dtype)


Later = list[Callable[[], None]]
"""What is still to be written, of weights as they are now."""


def save_model(model: Any, directory: Path, dtype: SaveDtype = "auto", later: Later | None = None) -> None:
    """``save_pretrained`` with the weights in ``dtype``; ``auto``: in bfloat16 where they come from bfloat16, or else
    in float32. (In float16, trained weights could pass what it holds.) Adapters stay as they are.

    What is large is copied to the CPU and left to ``later``, if there is such a list."""
    is_half = getattr(model, _SOURCE_DTYPE, None) == torch.bfloat16 if dtype == "auto" else dtype == "bfloat16"
    if not isinstance(model, PreTrainedModel) or has_adapters(model) or not (is_half or later is not None):
        model.save_pretrained(directory)
        return
    taken: dict[int, Tensor] = {}  # by where it lies, so that tied weights stay one
    for weight in (every := model.state_dict()).values():
        if weight.data_ptr() not in taken:
            kind = torch.bfloat16 if is_half and weight.is_floating_point() else weight.dtype
            where = weight.device if later is None else "cpu"
            taken[weight.data_ptr()] = weight.to(where, kind, copy=later is not None)
    weights = {name: taken[weight.data_ptr()] for name, weight in every.items()}
    stored = "bfloat16" if is_half else str(model.dtype).removeprefix("torch.")

    def write() -> None:
        model.save_pretrained(directory, state_dict=weights)
        # It writes the dtype that the model has by now, which of a sharded one in a pass is that of the pass.
        config = json.loads((directory / "config.json").read_text())
        if config["dtype"] != stored:
            (directory / "config.json").write_text(json.dumps(config | {"dtype": stored}, indent=2) + "\n")

    if later is None:
        write()
    else:
        later.append(write)


def use_liger_kernels(model: PreTrainedModel) -> None:
    """Replace layers of ``model`` by Liger's where it knows the architecture; they run on GPUs only."""
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})  # the losses are ours
