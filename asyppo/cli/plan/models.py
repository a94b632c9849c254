"""The models that a plan counts: their shapes, and their parameters on torch's meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedConfig

from asyppo.config import AsyPPOConfig, ConfigError, ModelShape
from asyppo.models.critics.loading import BackboneWithValueHead, value_head
from asyppo.models.critics.side import SideCritic, SideShape
from asyppo.models.layers import numbered, size_of
from asyppo.models.policy import weights_of_products

# Shapes of the models that the ready configurations name, as their config.json on the hub has them: hidden size,
# layers, query heads, intermediate size, tied embeddings. All have 8 key and value heads of 128 and 151,936 tokens.
_QWEN3 = {
    "0.6B": (1024, 28, 16, 3072, True),
    "1.7B": (2048, 28, 16, 6144, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
    "14B": (5120, 40, 40, 17408, False),
}
_WARM_START_VOCABULARY = 386  # what its tokenizer comes to on chain sums

# Kinds of layers, as configurations call them, that keep a state of fixed size.
STATEFUL = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe"}


@dataclass(frozen=True)
class Model:
    """What the plan has to know of a model."""

    name: str
    source: str
    """Where its shape is from."""
    config: PreTrainedConfig
    parameters: int
    trainable: int
    largest_layer: int
    """Parameters of the largest block that FSDP2 gathers at once."""
    is_critic: bool
    products: int
    """Parameters of ``weights_of_products``."""
    outside: int = 0
    """Parameters that are in no layer."""
    linear: int = 0
    """Parameters of the body's linear layers, which may be kept in 4 bits."""
    in_4_bits: bool = False
    matrix: int = 0
    """Parameters of the largest of these layers."""
    rank: int = 0
    """Of its adapters; 0: all its weights are trained."""
    targets: list[str] | None = None
    """Layers that have adapters, as ``policy.lora_target_modules``."""
    uniform: bool = False
    """Whether its layers are all of one kind and size."""

    @property
    def text(self) -> Any:
        """Its language model's configuration."""
        return self.config.get_text_config()

    @property
    def kinds(self) -> list[str]:
        """The kind of each layer, where the configuration tells them apart."""
        return getattr(self.text, "layer_types", None) or getattr(self.text, "layers_block_type", None) or []

    @property
    def goes_token_by_token(self) -> bool:
        """Whether transformers' own code of a layer loops over the tokens, rather than over chunks of them."""
        stateful = not hasattr(self.text, "num_attention_heads") or any(kind in STATEFUL for kind in self.kinds)
        return stateful and not any(name.endswith("chunk_size") or name == "block_size" for name in vars(self.text))

    def of_layers(self, count: int) -> Model:
        """Return it with so many layers, as far as its configuration goes."""
        changed = copy.deepcopy(self.config)
        changed.num_hidden_layers = count
        for name in ("layer_types", "layers_block_type"):
            if vars(changed).get(name):
                setattr(changed, name, getattr(changed, name)[:count])
        return replace(self, config=changed, uniform=False)

    def kv_bytes_per_token(self, element: int) -> int:
        """Bytes of the key-value cache for one token of one sequence; layers with a state have none."""
        text = self.text
        queries = getattr(text, "num_attention_heads", None)
        if queries is None:
            return 0
        layers = sum(kind not in STATEFUL for kind in self.kinds) if self.kinds else text.num_hidden_layers
        head = getattr(text, "head_dim", None) or text.hidden_size // queries
        heads = getattr(text, "num_key_value_heads", None) or queries
        return 2 * layers * heads * head * element


def policy_config(config: AsyPPOConfig) -> tuple[str, str, PreTrainedConfig]:
    if config.warm_start is not None:
        return "policy", "warm_start", _of_shape(config.warm_start.policy)
    if config.policy.model_name_or_path is None:
        raise ConfigError("policy.model_name_or_path: got None, needs a model, or else a warm_start")
    return ("policy " + config.policy.model_name_or_path, *load_config(config.policy.model_name_or_path, config))


def critic_config(config: AsyPPOConfig) -> tuple[str, str, PreTrainedConfig]:
    name = config.critic.model_name_or_path
    label = f"each of {config.num_critics} critics" if config.num_critics > 1 else "critic"
    if config.resolved_algorithm.critics == "policy" or (config.warm_start is None and name is None):
        _, source, found = policy_config(config)
        return f"{label} as the policy", source, copy.deepcopy(found)
    if name is None:
        assert config.warm_start is not None
        return label, "warm_start", _of_shape(config.warm_start.critic)
    first = name if isinstance(name, str) else name[0]
    return (f"{label} {first}", *load_config(first, config))


def _of_shape(shape: ModelShape) -> PreTrainedConfig:
    head_dim = shape.hidden_size // shape.num_attention_heads
    return AutoConfig.for_model(
        "qwen3", vocab_size=_WARM_START_VOCABULARY, tie_word_embeddings=True, head_dim=head_dim, **vars(shape)
    )


_KNOWN: dict[str, PreTrainedConfig] = {}
"""Shapes known here that no file on this machine has: looked for once."""


def load_config(name: str, config: AsyPPOConfig) -> tuple[str, PreTrainedConfig]:
    """Return where a model's configuration is from, and it: a directory or transformers' cache, else the shapes known
    here, else the hub. Raises ConfigError."""
    remote = {"trust_remote_code": config.policy.trust_remote_code}
    if name in _KNOWN:
        return "shape known here, not looked up on the hub", copy.deepcopy(_KNOWN[name])
    try:
        return "its config.json", AutoConfig.from_pretrained(name, local_files_only=True, **remote)
    except (OSError, ValueError, KeyError) as error:
        if Path(name).expanduser().exists():
            raise ConfigError(f"model_name_or_path: {name!r}: {' '.join(str(error).split())}") from error
    known = known_shape(name)
    if known is not None:
        _KNOWN[name] = known
        return "shape known here, not looked up on the hub", copy.deepcopy(known)
    try:
        return "the hub", AutoConfig.from_pretrained(name, **remote)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model_name_or_path: got {name!r}, which is no directory, and the hub gives no configuration of it; "
            f"needs a directory with a config.json, or Qwen/Qwen3-SIZE[-Base], SIZE one of {', '.join(_QWEN3)}"
        ) from error


def known_shape(name: str) -> PreTrainedConfig | None:
    """Return the configuration of a model whose shape is known without its files, or None."""
    size = name.removeprefix("Qwen/Qwen3-").removesuffix("-Base")
    if not name.startswith("Qwen/Qwen3-") or size not in _QWEN3:
        return None
    hidden, layers, heads, intermediate, tied = _QWEN3[size]
    return AutoConfig.for_model(
        "qwen3",
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        vocab_size=151_936,
        tie_word_embeddings=tied,
        max_position_embeddings=32_768,
        use_cache=False,
    )


_DESCRIBED: dict[tuple[Any, ...], Model] = {}


def describe(
    name: str, source: str, model_config: PreTrainedConfig, *, config: AsyPPOConfig, is_critic: bool = False
) -> Model:
    """Count a model's parameters on the meta device."""
    branch: Any = config.critic if is_critic else config.policy
    targets = None if is_critic else branch.lora_target_modules
    rank = branch.lora_r if is_critic or branch.use_peft else 0
    key = model_config.to_json_string(), is_critic, rank, str(targets), branch.load_in_4bit
    if key not in _DESCRIBED:
        _DESCRIBED[key] = _described(model_config, is_critic, rank, targets, branch.load_in_4bit)
    return replace(_DESCRIBED[key], name=name, source=source, config=model_config)


def _described(
    model_config: PreTrainedConfig, is_critic: bool, rank: int, targets: list[str] | None, in_4_bits: bool
) -> Model:
    with torch.device("meta"):
        model = from_config(model_config, is_critic)
    parameters = sum(p.numel() for p in model.parameters())
    products = sum(p.numel() for p in weights_of_products(model))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    largest, outside = max(sizes, default=parameters), parameters - sum(sizes)
    matrices = [m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    linear, matrix = sum(matrices), max(matrices, default=0)
    trainable = parameters
    if rank:
        adapters = trainable = _adapter_parameters(model, rank, targets)
        if is_critic:
            trainable += sum(p.numel() for p in value_head(model).parameters())
        parameters += adapters
    found = Model("", "", model_config, parameters, trainable, largest, is_critic, products, outside, linear, in_4_bits)
    alike = len(set(sizes)) == len({type(layer) for layer in layers_of(model)}) == 1 and len(set(found.kinds)) < 2
    uniform = alike and found.text is model_config and len(sizes) == model_config.num_hidden_layers
    return replace(found, matrix=matrix, rank=rank, targets=targets, uniform=uniform)


def side_shape(policy: Model, config: AsyPPOConfig) -> SideShape:
    """Return the shape of side critics that read this policy. Raises ConfigError."""
    with torch.device("meta"):
        made = from_config(policy.config, is_critic=False)
    layers = numbered(made, config.critic.side.layers)
    return SideShape.of(config.critic, layers, size_of(made, layers))


def describe_side(shape: SideShape, config: AsyPPOConfig) -> Model:
    """Count a side critic's parameters on the meta device."""
    with torch.device("meta"):
        made = SideCritic(shape)
    parameters, layer = (sum(p.numel() for p in part.parameters()) for part in (made, made.layers[0]))
    label = f"each of {config.num_critics} side critics" if config.num_critics > 1 else "side critic"
    sizes = parameters, parameters, layer, True, parameters, parameters - layer
    return Model(label, "critic.side", made.config, *sizes)


def _adapter_parameters(model: Any, rank: int, ends: list[str] | None) -> int:
    """Elements of LoRA adapters on the linear layers of the body whose names end so; None: on all of them."""
    linear = [(name, m) for name, m in model.base_model.named_modules() if isinstance(m, nn.Linear)]
    chosen = [m for name, m in linear if ends is None or any(name == e or name.endswith(f".{e}") for e in ends)]
    return sum(rank * (m.in_features + m.out_features) for m in chosen)


def from_config(model_config: PreTrainedConfig, is_critic: bool, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model of this configuration, with weights in ``dtype``."""
    made = copy.deepcopy(model_config)
    if not is_critic:
        return AutoModelForCausalLM.from_config(made, dtype=dtype)
    if type(made) in AutoModelForTokenClassification._model_mapping:
        made.num_labels = 1
        return AutoModelForTokenClassification.from_config(made, dtype=dtype)
    head = AutoModelForCausalLM.from_config(made).get_output_embeddings()
    return BackboneWithValueHead(AutoModel.from_config(made, dtype=dtype), head.in_features)


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder's layers: the longest list of modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))
