"""How much memory a configuration takes on each GPU: ``asyppo plan``.

Weights are counted on torch's meta device and activations by running the models' forward pass on fake tensors, so both
are those of the very classes that train, for any architecture, without a GPU and without the weights. What depends on
the allocator, on kernels of the GPU and on the text is bounded from above; ``ASSUMPTIONS`` says how.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedConfig

from asyppo.config import AsyPPOConfig, ConfigError, ModelShape
from asyppo.models.critics.loading import BackboneWithValueHead, value_head
from asyppo.models.critics.side import SideCritic, SideShape
from asyppo.models.layers import numbered, size_of
from asyppo.models.loading import room_for_prompts
from asyppo.models.policy import compute_dtype, weights_of_products
from asyppo_kernels._policy_head import GPU_WORKSPACE_BYTES

GIB = 2**30

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

ASSUMPTIONS = (
    "every response is {completion} tokens long, every prompt {prompt}",
    "activations are what transformers' own forward pass keeps; Liger's and the stacked critics' kernels keep less",
    "a backward pass needs, beside what is kept, as much as one layer keeps; so does a pass without gradients",
    "weights are sharded over several GPUs, the batch and activations are not: each has its own micro-batch",
    "layers with a state in place of a cache (Mamba's and their like) keep little of it: it is not counted",
    "the context of CUDA, other libraries' workspaces and fragmentation are not counted: leave 10 % free",
)


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch."""

    kept: int
    """By the forward pass for the backward pass."""
    layer: int
    """By one layer of it."""
    casts: int
    """Copies of weights in the precision of the pass."""


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


@dataclass
class Plan:
    """Bytes on each GPU, by phase of a step and by component."""

    models: list[Model]
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)
    gpus: int = 1

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that needs most, and its bytes."""
        totals = {name: sum(parts.values()) for name, parts in self.phases.items()}
        name = max(totals, key=lambda phase: totals[phase])
        return name, totals[name]

    def table(self) -> str:
        """Return the plan as text."""
        lines = [f"{m.name}: {m.parameters / 1e9:,.3f} billion parameters ({m.source})" for m in self.models]
        components = list(dict.fromkeys(c for parts in self.phases.values() for c in parts))
        rows = [["GiB on each GPU", *self.phases]]
        for component in components:
            rows.append([component, *(_gib(parts.get(component)) for parts in self.phases.values())])
        rows.append(["total", *(_gib(sum(parts.values())) for parts in self.phases.values())])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines.append("")
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            lines.append("  ".join(cells).rstrip())
        name, total = self.peak
        lines += ["", f"peak: {total / GIB:.1f} GiB on each of {self.gpus} GPU{'s' * (self.gpus > 1)}, {name}"]
        return "\n".join([*lines, "assumed:", *(f"  - {text}" for text in self.assumptions)])


def _gib(size: int | None) -> str:
    return "" if not size else f"{size / GIB:.2f}" if size >= GIB / 100 else "<0.01"


def make_plan(config: AsyPPOConfig, *, gpus: int = 1, prompt_length: int = 1024) -> Plan:
    """Estimate the memory of ``config`` on each of ``gpus`` GPUs. Raises ConfigError where a model is unknown, or
    ``distributed.replicate`` does not divide ``gpus``."""
    replicas = config.distributed.replicate
    if gpus % replicas:
        raise ConfigError(f"distributed.replicate: got {replicas}, needs a divisor of the number of GPUs, {gpus}")
    shards = gpus // replicas
    dtype = compute_dtype(config.policy.dtype, torch.device("cuda"))
    element = dtype.itemsize
    policy = describe(*_policy_config(config), config=config)
    side = config.num_critics > 0 and config.critic.kind == "side"
    critic = (
        describe(*_critic_config(config), config=config, is_critic=True) if config.num_critics and not side else None
    )
    room = room_for_prompts(config, [m.config for m in (policy, critic) if m is not None])
    shape = side_shape(policy, config) if side else None
    if shape is not None:
        critic = describe_side(shape, config)
    prompt = min(config.data.max_prompt_length or prompt_length, room)
    width = prompt + config.max_completion_length
    plan = Plan([policy, *([critic] if critic else [])], gpus=gpus)
    plan.assumptions = [a.format(completion=config.max_completion_length, prompt=prompt) for a in ASSUMPTIONS]

    # Always there.
    always: dict[str, int] = _resident("policy", policy, element, shards)
    if critic is not None:
        always |= _resident("critics", critic, element, shards, config.num_critics)
    if config.beta > 0 and not config.policy.use_peft:
        always["reference weights"] = (4 * policy.parameters - (4 - element) * policy.products) // shards
    everyones = config.prompts_per_step * config.num_generations
    always["batch"] = everyones * (8 * width + _BATCH_BYTES * config.max_completion_length)
    responses = -(-everyones // gpus)
    # Of shards a copy is gathered for each time; a single process keeps one where its weights are not what it samples
    # with.
    copy_to_sample_with = {"policy copy to sample with": element * policy.parameters}
    engine = config.sampler == "vllm"
    if gpus == 1 and element < 4 and not config.policy.use_peft and not engine:
        always |= copy_to_sample_with

    # `generate` has a batch of sequences side by side; continuous batching has as many as there is room for.
    sequences = max(1, min(config.generation_batch_size, responses))
    cache = width * policy.kv_bytes_per_token(element)
    flash = "flash" in (config.policy.attn_implementation or "")
    if engine:
        share = f"up to vllm.gpu_memory_utilization = {config.vllm.gpu_memory_utilization:g} of the GPU"
        plan.assumptions.append(
            f"vLLM is not counted: its process takes {share}"
            if not config.vllm.url
            else "vLLM is on servers, and not counted"
        )
    elif config.sampler not in ("generate", "auto") or (config.sampler == "auto" and flash):
        plan.assumptions.append(
            f"continuous batching has as many responses under way, up to {sequences}, as there is room for: one is "
            f"counted here, each more takes {cache / GIB:.2f} GiB while it is at its longest"
        )
        sequences = 1
    in_this_process = {
        **(copy_to_sample_with if gpus > 1 else {}),
        "key-value cache": sequences * cache,
        "next-token logits": 4 * 4 * sequences * policy.text.vocab_size,
        "prompts in one pass": _prefill(policy, sequences * prompt, element),
    }
    plan.phases["generation"] = always | ({} if engine else in_this_process)

    rows = max(1, config.max_tokens_per_micro_batch // width)
    policy_activations = activations(policy, rows, width, dtype, config.policy.gradient_checkpointing)
    tokens = min(rows, responses) * config.max_completion_length
    head = _head(policy, tokens, element)
    states = _kept_states(shape, config, everyones * config.max_completion_length, element)
    plan.phases["log-probs"] = always | {
        **states,
        "weights as computed with": _in_use(policy, policy_activations, element, gpus),
        "within a layer": policy_activations.layer,
        **{k: v for k, v in head.items() if "gradient" not in k},
    }
    if critic is not None:
        rows = max(config.num_critics, config.max_tokens_per_micro_batch // width)
        if shape is None:
            critic_activations = activations(critic, rows, width, dtype, config.critic.gradient_checkpointing)
        else:
            critic_activations = side_activations(shape, rows, config.max_completion_length, dtype)
        made_again = {}
        if shape is not None and not states:
            made_again = {
                "policy's weights as computed with": _in_use(policy, policy_activations, element, gpus),
                "within a layer of the policy": policy_activations.layer,
                "hidden states that critics read": rows * config.max_completion_length * shape.states_size * element,
            }
        # A frozen backbone is there once, and in the precision of the pass already.
        in_use = 0 if config.critic.lora_r else config.num_critics * _in_use(critic, critic_activations, element, gpus)
        plan.phases["critic update"] = always | {
            **states,
            **made_again,
            "gradients": 4 * config.num_critics * critic.trainable // shards,
            "weights as computed with": in_use,
            "activations": critic_activations.kept,
            "within a layer": critic_activations.layer,
        }
        plan.phases["values"] = always | {
            **states,
            **made_again,
            "weights as computed with": in_use,
            "within a layer": critic_activations.layer,
        }
    plan.phases["policy update"] = always | {
        "gradients": 4 * policy.trainable // shards,
        "weights as computed with": _in_use(policy, policy_activations, element, gpus),
        "activations": policy_activations.kept,
        "within a layer": policy_activations.layer,
        **head,
    }
    return plan


# Per response token: eight float32 (rewards, log-probs and their like), four of the advantages, masks.
_BATCH_BYTES = 4 * 16


def _kept_states(shape: SideShape | None, config: AsyPPOConfig, tokens: int, element: int) -> dict[str, int]:
    """Hidden states of all response tokens that side critics of this ``shape`` read, where they are kept."""
    size = 0 if shape is None else tokens * shape.states_size * element
    return {"hidden states that critics read": size} if 0 < size <= config.critic.side.keep_bytes else {}


def _resident(name: str, model: Model, element: int, shards: int, count: int = 1) -> dict[str, int]:
    """Weights in float32 and AdamW's two moments; frozen weights, which all share, as they are computed with."""
    frozen = model.parameters - model.trainable
    return {
        f"{name} weights": (4 * count * model.trainable + element * frozen) // shards,
        f"{name} optimizer": count * 8 * model.trainable // shards,
    }


def _in_use(model: Model, activations: Activations, element: int, gpus: int) -> int:
    """Copies of weights in the precision of the pass: all of them under autocast, two layers gathered by FSDP2."""
    return activations.casts if gpus == 1 else 2 * element * model.largest_layer


def _head(policy: Model, tokens: int, element: int) -> dict[str, int]:
    """Of ``linear_ppo_loss`` on ``tokens`` rows: logits of some rows at a time, the gradients formed in the forward."""
    hidden, vocabulary = policy.text.hidden_size, policy.text.vocab_size
    return {
        "head as computed with": element * hidden * vocabulary,
        "head workspace": min(GPU_WORKSPACE_BYTES, (4 + element) * tokens * vocabulary),
        "head gradients": 4 * hidden * vocabulary + 4 * hidden * tokens,
    }


def _prefill(policy: Model, tokens: int, element: int) -> int:
    """The widest place of the pass over all prompts at once: gate, up and their product, and the stream beside them."""
    text = policy.text
    return tokens * (3 * getattr(text, "intermediate_size", 4 * text.hidden_size) * element + 4 * text.hidden_size)


# --- models ---


def _policy_config(config: AsyPPOConfig) -> tuple[str, str, PreTrainedConfig]:
    if config.warm_start is not None:
        return "policy", "warm_start", _of_shape(config.warm_start.policy)
    if config.policy.model_name_or_path is None:
        raise ConfigError("policy.model_name_or_path: got None, needs a model, or else a warm_start")
    return ("policy " + config.policy.model_name_or_path, *load_config(config.policy.model_name_or_path, config))


def _critic_config(config: AsyPPOConfig) -> tuple[str, str, PreTrainedConfig]:
    name = config.critic.model_name_or_path
    label = f"each of {config.num_critics} critics" if config.num_critics > 1 else "critic"
    if config.resolved_algorithm.critics == "policy" or (config.warm_start is None and name is None):
        _, source, found = _policy_config(config)
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


def load_config(name: str, config: AsyPPOConfig) -> tuple[str, PreTrainedConfig]:
    """Return where a model's configuration is from, and it: a directory or transformers' cache, else the shapes known
    here, else the hub. Raises ConfigError."""
    remote = {"trust_remote_code": config.policy.trust_remote_code}
    try:
        return "its config.json", AutoConfig.from_pretrained(name, local_files_only=True, **remote)
    except (OSError, ValueError, KeyError) as error:
        if Path(name).expanduser().exists():
            raise ConfigError(f"model_name_or_path: {name!r}: {' '.join(str(error).split())}") from error
    known = known_shape(name)
    if known is not None:
        return "shape known here, not looked up on the hub", known
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


def describe(
    name: str, source: str, model_config: PreTrainedConfig, *, config: AsyPPOConfig, is_critic: bool = False
) -> Model:
    """Count a model's parameters on the meta device."""
    with torch.device("meta"):
        model = _from_config(model_config, is_critic)
    parameters = sum(p.numel() for p in model.parameters())
    products = sum(p.numel() for p in weights_of_products(model))
    layers = _layers(model)
    largest = max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=parameters)
    trainable = parameters
    if config.policy.use_peft and not is_critic:
        trainable = _adapter_parameters(model, config.policy.lora_r, config.policy.lora_target_modules)
        parameters += trainable
    if config.critic.lora_r and is_critic:
        trainable = _adapter_parameters(model, config.critic.lora_r, None)
        trainable += sum(p.numel() for p in value_head(model).parameters())
        parameters += trainable - sum(p.numel() for p in value_head(model).parameters())
    return Model(name, source, model_config, parameters, trainable, largest, is_critic, products)


def side_shape(policy: Model, config: AsyPPOConfig) -> SideShape:
    """Return the shape of side critics that read this policy. Raises ConfigError."""
    with torch.device("meta"):
        made = _from_config(policy.config, is_critic=False)
    layers = numbered(made, config.critic.side.layers)
    return SideShape.of(config.critic, layers, size_of(made, layers))


def describe_side(shape: SideShape, config: AsyPPOConfig) -> Model:
    """Count a side critic's parameters on the meta device."""
    with torch.device("meta"):
        made = SideCritic(shape)
    parameters, layer = (sum(p.numel() for p in part.parameters()) for part in (made, made.layers[0]))
    label = f"each of {config.num_critics} side critics" if config.num_critics > 1 else "side critic"
    return Model(label, "critic.side", made.config, parameters, parameters, layer, True, parameters)


def _adapter_parameters(model: Any, rank: int, ends: list[str] | None) -> int:
    """Elements of LoRA adapters on the linear layers of the body whose names end so; None: on all of them."""
    linear = [(name, m) for name, m in model.base_model.named_modules() if isinstance(m, nn.Linear)]
    chosen = [m for name, m in linear if ends is None or any(name == e or name.endswith(f".{e}") for e in ends)]
    return sum(rank * (m.in_features + m.out_features) for m in chosen)


def _from_config(model_config: PreTrainedConfig, is_critic: bool) -> Any:
    made = copy.deepcopy(model_config)
    if not is_critic:
        return AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    if type(made) in AutoModelForTokenClassification._model_mapping:
        made.num_labels = 1
        return AutoModelForTokenClassification.from_config(made, dtype=torch.float32)
    head = AutoModelForCausalLM.from_config(made).get_output_embeddings()
    return BackboneWithValueHead(AutoModel.from_config(made, dtype=torch.float32), head.in_features)


def _layers(model: Any) -> list[nn.Module]:
    """The decoder's layers: the longest list of modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def activations(model: Model, rows: int, width: int, dtype: torch.dtype, checkpointing: bool) -> Activations:
    """Count what a forward pass over int64 [rows, width] tokens, some of them padding, keeps for the backward pass.

    The pass runs on fake tensors, which have shapes and no memory. With ``checkpointing`` a layer keeps its input only.
    Layers that go through the tokens one by one would take minutes: what they keep is at most quadratic in the width,
    and found from three short passes.
    """
    short = (64, 128, 192)
    if width <= max(short) or not model.goes_token_by_token:
        return _counted(model, rows, width, dtype, checkpointing)
    counts = [_counted(model, rows, w, dtype, checkpointing) for w in short]
    # Lagrange's polynomial through the three.
    weights = [math.prod((width - other) / (own - other) for other in short if other != own) for own in short]
    kept, layer = (
        round(sum(w * getattr(c, name) for w, c in zip(weights, counts, strict=True))) for name in ("kept", "layer")
    )
    return Activations(kept, layer, counts[0].casts)


def _counted(model: Model, rows: int, width: int, dtype: torch.dtype, checkpointing: bool) -> Activations:
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = _from_config(model.config, model.is_critic)
        body = made.base_model
        with _counting(made) as count, _GroupedProducts():
            ids = torch.zeros(rows, width, dtype=torch.int64)
            mask = torch.ones_like(ids)
            with torch.autocast("cpu", dtype=torch.bfloat16) if dtype != torch.float32 else nullcontext():
                hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    inputs = hidden.numel() * hidden.element_size()
    largest = max(count.by_layer, default=0)
    kept = count.total
    if checkpointing:
        kept += sum(min(0, inputs - size) for size in count.by_layer)
    return Activations(kept, largest, count.casts)


def side_activations(shape: SideShape, rows: int, width: int, dtype: torch.dtype) -> Activations:
    """As ``activations``, of a side critic that reads ``width`` states of each of ``rows`` responses."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = SideCritic(shape)
        with _counting(made) as count:
            states = torch.zeros(rows, width, shape.states_size, dtype=dtype)
            inputs = torch.zeros(rows, width, len(shape.policy_inputs)) if shape.policy_inputs else None
            with torch.autocast("cpu", dtype=torch.bfloat16) if dtype != torch.float32 else nullcontext():
                made(states, inputs)
    return Activations(count.total, max(count.by_layer, default=0), count.casts)


class _GroupedProducts(TorchFunctionMode):
    """Experts' products, [N, in] by [E, in, out], as one of the same size: torch's own have no fake form in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) in ("grouped_mm", "_grouped_mm"):
            return args[0] @ args[1][0]
        return func(*args, **(kwargs or {}))


class _Count:
    """Bytes that autograd has saved, each storage once."""

    def __init__(self, model: nn.Module):
        self.total = 0
        self.casts = 0
        self.by_layer: list[int] = []
        self.linear = Counter(tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear))
        # Storages are kept, so that none gets the address of another. The weights themselves do not count.
        self.seen = {p.untyped_storage()._cdata: p.untyped_storage() for p in model.parameters()}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Autograd saves ``tensor``."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.seen:
            return tensor
        self.seen[storage._cdata] = storage
        shapes = [tuple(tensor.shape), tuple(tensor.shape)[::-1]]
        cast = next((s for s in shapes if tensor.dtype != torch.float32 and self.linear[s] > 0), None)
        if cast is None:
            self.total += storage.nbytes()
        else:
            self.linear[cast] -= 1
            self.casts += storage.nbytes()
        return tensor


@contextmanager
def _counting(model: nn.Module) -> Iterator[_Count]:
    """Count the bytes that autograd saves, other than the weights themselves, and those of each layer."""
    count = _Count(model)
    before: list[int] = []
    hooks = []
    for layer in _layers(model):
        hooks.append(layer.register_forward_pre_hook(lambda *_: before.append(count.total)))
        hooks.append(layer.register_forward_hook(lambda *_: count.by_layer.append(count.total - before.pop())))
    with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda tensor: tensor):
        yield count
    for hook in hooks:
        hook.remove()
