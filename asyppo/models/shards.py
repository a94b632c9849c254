"""Models whose weights every rank reads from their files for itself, its own shards alone.

Such a model is built on torch's meta device by ``load_pretrained``, where its weights take no memory, and keeps note of
where they lie; once it is sharded, ``read_shards`` reads what this rank holds. What a family computes cannot be
measured on weights that are not there, so this is for families whose layers are known (``FAMILIES``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from asyppo.config import ConfigError
from asyppo.distributed.processes import agreed
from asyppo.distributed.sharding import local
from asyppo.models.families import FAMILIES

_FILES = "_asyppo_files"


@dataclass(frozen=True)
class Place:
    """Where a weight lies."""

    file: str
    name: str
    """In the file."""


@dataclass(frozen=True)
class WeightFiles:
    """Where the weights of a model lie that are not loaded yet."""

    setting: str
    """Which named the model."""
    places: dict[str, Place]
    """By the names of the model's parameters."""


def why_whole(config: PreTrainedConfig) -> str | None:
    """Return why a model of ``config`` has to be loaded whole; None where its shards can be read."""
    families: list[Any] = list(FAMILIES)
    known = {family.config_class for family in families}
    if type(config) not in known:
        names = ", ".join(sorted(each.model_type for each in known))
        return f"its family, {config.model_type}, is none of {names}"
    if getattr(config, "quantization_config", None) is not None:
        return "its files hold quantized weights"
    return None if getattr(config, "is_causal", True) else "it is not causal"


def weights_come_later(model: Any) -> bool:
    """Return whether weights of ``model`` are still to be read."""
    return any(p.is_meta for p in model.parameters())


def note_files(model: PreTrainedModel, path: str, setting: str, missing: set[str]) -> str | None:
    """Note where the weights of ``model``, which is on the meta device, lie in ``path``, a directory or hub name, and
    make what takes no weights from there: those that are ``missing``, and tables of positions. Returns why it has to be
    loaded whole, None if it has not."""
    found = _places(path)
    if found is None:
        return "it has no safetensors"
    prefix, places = f"{model.base_model_prefix}.", {}
    for name, _ in model.named_parameters():
        if name in missing:
            continue
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        place = found.get(name) or found.get(other)
        if place is None:
            return f"its files have no {name}"
        places[name] = place
    for name in {name.rpartition(".")[0] for name in missing}:
        _draw(model, model.get_submodule(name))
    body: Any = model.base_model
    body.rotary_emb = type(body.rotary_emb)(body.config)
    setattr(model, _FILES, WeightFiles(setting, places))
    return None


def files_of(model: Any) -> WeightFiles | None:
    """Return where the weights of ``model`` lie that are to be read; None for one that was loaded whole."""
    return getattr(model, _FILES, None)


def _draw(model: Any, module: nn.Module) -> None:
    """Give ``module`` new weights as transformers does."""
    for name, parameter in module.named_parameters(recurse=False):
        setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
    model._init_weights(module)


def _places(path: str) -> dict[str, Place] | None:
    """Where each weight of a directory or hub name lies, by its name there; None without safetensors."""
    found: dict[str, Place] = {}

    def look(name: str) -> str | None:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False)

    single, index = look(SAFE_WEIGHTS_NAME), look(SAFE_WEIGHTS_INDEX_NAME)
    if single is not None:
        with safe_open(single, framework="pt") as weights:
            return {name: Place(single, name) for name in weights.keys()}  # noqa: SIM118
    if index is None:
        return None
    files: dict[str, str | None] = {}
    for name, file in json.loads(Path(index).read_text())["weight_map"].items():
        place = files.setdefault(file, None) or look(file)
        if place is None:
            return None
        files[file] = place
        found[name] = Place(place, name)
    return found


@contextmanager
def weights_stood_in_for(model: nn.Module) -> Iterator[None]:
    """Inside, weights of ``model`` that are still to be read pass for zeros on the CPU, of no size: what is made beside
    them is made there, and has values."""
    absent: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zeros, parameter.requires_grad)
                absent.append((module, name, parameter))
    try:
        yield
    finally:
        for module, name, parameter in absent:
            stand_in = module._parameters[name]
            assert stand_in is not None
            parameter.requires_grad_(stand_in.requires_grad)
            module._parameters[name] = parameter


Sources = Callable[[str], Sequence[tuple[WeightFiles, str]]]
"""For the name of a parameter where it is from, by files and a model's name for it: once, or M times for one that is
stacked, [M, …]."""


def read_shards(module: nn.Module, of: Sources, device_type: str, names: set[str] | None = None) -> None:
    """As ``read_weights``, on all ranks together: an error on one is raised on each."""
    agreed(lambda: read_weights(module, of, device_type, names))


@torch.no_grad()
def read_weights(module: nn.Module, of: Sources, device_type: str, names: set[str] | None = None) -> None:
    """Read what this rank holds of the weights of ``module`` that are still to be read, in place and onto the device;
    only of those with these ``names``, if there are some. Raises ConfigError for a weight that is not finite, or cannot
    be read."""
    made: dict[int, nn.Parameter] = {}
    bad: list[tuple[WeightFiles, str]] = []
    with _Opened() as opened:
        for path, part in module.named_modules():
            for own, parameter in part.named_parameters(recurse=False):
                name = f"{path}.{own}".lstrip(".")
                if not local(parameter).is_meta or (names is not None and name not in names):
                    continue
                if id(parameter) not in made:  # tied weights stay tied
                    sources = of(name)
                    made[id(parameter)] = _read(parameter, sources, device_type, opened)
                    if not local(made[id(parameter)]).sum(dtype=torch.float64).isfinite():
                        bad += sources[:1]
                setattr(part, own, made[id(parameter)])
    if bad:
        files, name = bad[0]
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ConfigError(
            f"{files.setting}: the weight {name} in {files.places[name].file}{more} has NaN or infinity in it; needs "
            "finite weights"
        )


class _Opened(ExitStack):
    """Files that stay open until it is left."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Any] = {}

    def slices(self, files: WeightFiles, name: str) -> Any:
        """What gives slices of the weight ``name``. Raises ConfigError."""
        place = files.places[name]
        if place.file not in self.files:
            try:
                self.files[place.file] = self.enter_context(safe_open(place.file, framework="pt"))
            except OSError as error:
                raise ConfigError(f"{files.setting}: cannot read {place.file}: {error}") from error
        return self.files[place.file].get_slice(place.name)


def _read(
    parameter: nn.Parameter, sources: Sequence[tuple[WeightFiles, str]], device_type: str, opened: _Opened
) -> nn.Parameter:
    """The part of ``parameter`` that this rank holds, from its files."""
    found = torch.empty_like(parameter, device=device_type)
    part, region = local(found), _region(parameter)
    for number, source in enumerate(sources):
        weight = opened.slices(*source)
        if len(weight.get_shape()) == parameter.dim():
            _copy(part, weight, region)
        elif number in range(parameter.shape[0])[region[0]]:
            _copy(part[number - region[0].start], weight, region[1:])
    return nn.Parameter(found, parameter.requires_grad)


def _copy(target: Tensor, weight: Any, region: Sequence[slice]) -> None:
    if target.numel():
        target.copy_(weight[tuple(region)])


def _region(parameter: Tensor) -> list[slice]:
    """What this rank holds of ``parameter``, a slice a dimension: cut as ``torch.chunk`` does."""
    region = [slice(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return region
    mesh = parameter.device_mesh
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            size = parameter.shape[placement.dim]
            step = -(-size // mesh.size(axis))
            start = min(mesh.get_local_rank(axis) * step, size)
            region[placement.dim] = slice(start, min(start + step, size))
    return region
