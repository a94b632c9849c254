"""What the update and the training step share: sizes, configuration, models, the least work, the ratios aimed at.

A step is one of each optimizer, at a rate so small that float32 weights stay what they are, and without a bound on the
norm: all the work is done, and the oracle's gradient is what the optimizer sees. Models are Qwen3 from a config, with
the same random weights for every contender.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bench.cases import Case, Scale, Work

GRAPH = False
# In low precision some tokens fall on the other side of a mask's threshold, in the baseline some others.
SLACK = 2.0

Algorithm = Literal["asyppo", "ppo", "grpo"]
ALGORITHMS: tuple[Algorithm, ...] = ("asyppo", "ppo", "grpo")
CRITICS: dict[Algorithm, int] = {"asyppo": 2, "ppo": 1, "grpo": 0}

# Width H, depth L, heads, key and value heads, head dimension D, MLP width I.
Shape = dict[str, int]
SHAPES: dict[Scale, tuple[Shape, Shape, int]] = {  # policy, critic, vocabulary
    "gpu": (
        {"H": 2048, "L": 28, "heads": 16, "kv": 8, "D": 128, "I": 6144},
        {"H": 1024, "L": 28, "heads": 16, "kv": 8, "D": 128, "I": 3072},
        151_936,
    ),
    "cpu": (
        {"H": 256, "L": 4, "heads": 8, "kv": 4, "D": 32, "I": 768},
        {"H": 128, "L": 3, "heads": 4, "kv": 2, "D": 32, "I": 384},
        4001,
    ),
    "quick": (
        {"H": 32, "L": 2, "heads": 2, "kv": 1, "D": 16, "I": 64},
        {"H": 16, "L": 2, "heads": 2, "kv": 1, "D": 8, "I": 24},
        53,
    ),
}
# All contenders of the full size are there at once, and its oracle before them.
FULL_SIZE_BYTES = 130 * 10**9
SMALLER: tuple[Shape, Shape, int] = (
    {"H": 1024, "L": 28, "heads": 16, "kv": 8, "D": 128, "I": 3072},
    {"H": 512, "L": 28, "heads": 8, "kv": 4, "D": 128, "I": 1536},
    151_936,
)
GENERATIONS = 4  # responses a prompt
MAX_TOKENS = {"gpu": 8192, "cpu": 16_384, "quick": 64}  # of a micro-batch: whole logits of 8192 tokens are 4.6 GiB
DTYPE: dict[Scale, torch.dtype] = {"gpu": torch.bfloat16, "cpu": torch.float32, "quick": torch.float32}
HEAD_ROWS = 64  # of the gradient of the policy's head


@dataclass(frozen=True)
class Target:
    """A ratio of two contenders that is aimed at where ``scale`` is gpu."""

    figure: Literal["time", "memory"]
    of: tuple[str, ...]
    """The first of these that ran."""
    over: str
    most: float | None
    """None: the ratio is of interest, without a target."""


OURS = ("asyppo (triton)", "asyppo (torch)")
TARGETS = (
    Target("time", OURS, "symmetric PPO", 0.75),
    Target("memory", OURS, "symmetric PPO", 0.8),
    Target("time", OURS, "GRPO", 1.25),
    Target("time", OURS, "plain torch, stacked critics", 0.8),
    Target("time", OURS, "one by one", None),
)
TARGET_NOTE = "Targets are for one H200, a policy of 1.7 and critics of 0.6 billion parameters, 8 × 2048 tokens"


def training_case(op: str, scale: Scale, device: torch.device, batch: tuple[int, int, int]) -> list[Case]:
    """The one case of ``op``; none without transformers, and on a GPU Liger, which the trainer's models need there."""
    needed = ["transformers", *(["liger_kernel"] if device.type == "cuda" else [])]
    if any(importlib.util.find_spec(name) is None for name in needed):
        return []
    smaller = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < FULL_SIZE_BYTES
    policy, critic, vocabulary = SMALLER if scale == "gpu" and smaller else SHAPES[scale]
    rows, width, prompt = batch
    sizes = {"B": rows, "T": width, "prompt": prompt, "M": CRITICS["asyppo"], "V": vocabulary}
    sizes |= {f"policy {name}": size for name, size in policy.items()}
    sizes |= {f"critic {name}": size for name, size in critic.items()}
    options = {"backward": True, "max_tokens": MAX_TOKENS[scale]}
    name = f"{rows} × {width} tokens, policy H = {policy['H']}, critics H = {critic['H']}"
    return [Case(op, name, sizes, options, DTYPE[scale], device)]


def config_of(case: Case, algorithm: Algorithm) -> Any:
    """The trainer's configuration: its defaults, but for the sizes, one step an optimizer, weights that stay, and the
    pass for old log-probs, which several steps an optimizer need in bfloat16."""
    from asyppo.config import AsyPPOConfig, CriticConfig

    return AsyPPOConfig(
        algorithm=algorithm,
        critic=CriticConfig(num_critics=CRITICS["asyppo"], learning_rate=1e-30, max_grad_norm=1e30),
        learning_rate=1e-30,
        max_grad_norm=1e30,
        prompts_per_step=case.sizes["B"] // GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=case.sizes["T"] - case.sizes["prompt"],
        num_mini_batches=1,
        old_per_token_logps="compute",
        max_tokens_per_micro_batch=int(case.options["max_tokens"]),
        entropy_coef=0.1,  # with less, the loss would be the small difference of large sums
        logging_samples=0,
        device=case.device.type,
    )


def policy_model_of(case: Case) -> Any:
    """A causal language model, the same at every call; its head is its embedding."""
    from transformers import Qwen3ForCausalLM

    return _model(case, "policy", Qwen3ForCausalLM, seed=0, tie_word_embeddings=True)


def value_models_of(case: Case, algorithm: Algorithm) -> list[Any]:
    """The value models of ``algorithm``, the same at every call: PPO's is of the policy's shape."""
    from transformers import Qwen3ForTokenClassification

    of = "policy" if algorithm == "ppo" else "critic"
    return [
        _model(case, of, Qwen3ForTokenClassification, seed=1 + m, num_labels=1, classifier_dropout=0.0)
        for m in range(CRITICS[algorithm])
    ]


def _model(case: Case, of: str, kind: Any, *, seed: int, classifier_dropout: float | None = None, **more: Any) -> Any:
    from transformers import Qwen3Config

    names = {
        "H": "hidden_size",
        "L": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv": "num_key_value_heads",
        "D": "head_dim",
        "I": "intermediate_size",
    }
    sizes = {name: case.sizes[f"{of} {short}"] for short, name in names.items()}
    config = Qwen3Config(
        vocab_size=case.sizes["V"], max_position_embeddings=2 * case.sizes["T"], eos_token_id=None, **sizes, **more
    )
    if classifier_dropout is not None:
        config.classifier_dropout = classifier_dropout
    torch.manual_seed(seed)
    with torch.device(case.device):
        return kind(config).eval()


def watched(policy: Any, critics: list[Any]) -> dict[str, list[tuple[Tensor, int]]]:
    """By output, the parameters whose gradients are compared, and how many of their rows: everything else goes through
    the first layers' queries, and the head's rows are what the policy loss gives."""
    first = policy.get_decoder().layers[0].self_attn.q_proj.weight
    head = policy.get_output_embeddings().weight
    outputs = {"d_policy": [(first, len(first))], "d_head": [(head, HEAD_ROWS)]}
    if critics:
        queries = [model.base_model.layers[0].self_attn.q_proj.weight for model in critics]
        outputs["d_critic"] = [(query, len(query)) for query in queries]
    return outputs


def gradients_of(policy: Any, critics: list[Any]) -> dict[str, Tensor]:
    """The gradients that are compared, copied."""
    return {
        name: torch.stack([p.grad[:rows] for p, rows in parameters])
        for name, parameters in watched(policy, critics).items()
        if all(p.grad is not None for p, _ in parameters)
    }


def phases(case: Case) -> dict[str, Work]:
    """The least work of each of AsyPPO's phases: products with every weight, attention left out, and AdamW."""
    size = case.sizes
    tokens, responses = size["B"] * size["T"], size["B"] * (size["T"] - size["prompt"])
    policy, critic = (float(_layer_weights(case, of)) for of in ("policy", "critic"))
    head = float(size["V"] * size["policy H"])
    forward = policy * tokens + head * responses
    item = case.dtype.itemsize
    # AdamW reads four float32 numbers a parameter and writes three.
    all_critics = size["M"] * (critic + size["V"] * size["critic H"])
    return {
        "old_log_prob": Work(2 * forward, item * (policy + head)),
        "update_critic": Work(6 * critic * tokens, 28 * all_critics),
        "values": Work(2 * critic * size["M"] * tokens, item * size["M"] * critic),
        "adv": Work(0, 4.0 * responses * (size["M"] + 7)),  # reads values and reward, writes what the policy reads
        "update_actor": Work(6 * forward, 28 * (policy + head)),
    }


def _layer_weights(case: Case, of: str) -> int:
    h, layers, heads, kv, d, i = (case.sizes[f"{of} {name}"] for name in ("H", "L", "heads", "kv", "D", "I"))
    return layers * h * ((2 * heads + 2 * kv) * d + 3 * i)


def total(parts: dict[str, Work], note: str) -> Work:
    """Sum over phases."""
    return Work(sum(p.flops for p in parts.values()), sum(p.bytes for p in parts.values()), note)


def work(case: Case) -> Work:
    """Of AsyPPO; the others are shown as multiples of it, too."""
    return total(phases(case), "AsyPPO's products and AdamW; attention left out")


def answers(algorithm: Algorithm) -> frozenset[str]:
    """What a contender of this algorithm returns; its outputs have names of their own."""
    names = ["d_policy", "d_head", "loss", *(["d_critic", "vf_loss"] if CRITICS[algorithm] else [])]
    return frozenset(f"{algorithm} {name}" for name in names)


def required(case: Case) -> set[str]:
    """AsyPPO's; a contender of another algorithm states its own."""
    return set(answers("asyppo"))
