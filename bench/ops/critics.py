"""The critics of the trainer: values of all responses, and an optimizer step on disjoint shares.

Models are Qwen3 from a config, with the same random weights for every contender. A step ends with AdamW at a rate of 0:
all of its work is done, and the weights stay what the oracle has.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Inputs, Outputs, Run, Scale, Sweep, Work
from bench.registry import Absent, contender, need, need_gpu

OP = "critics"
GRAPH = False

# Width H, depth L, heads, key and value heads, head dimension D, MLP width I, vocabulary V.
Shape = dict[str, int]
SMALL: Shape = {"H": 64, "L": 2, "heads": 4, "kv": 2, "D": 16, "I": 192, "V": 128}
SHAPES: dict[Scale, list[Shape]] = {
    "gpu": [{"H": 1024, "L": 28, "heads": 16, "kv": 8, "D": 128, "I": 3072, "V": 151936}],
    "cpu": [
        SMALL,
        {"H": 128, "L": 3, "heads": 4, "kv": 2, "D": 32, "I": 384, "V": 1009},
        {"H": 256, "L": 4, "heads": 8, "kv": 4, "D": 32, "I": 768, "V": 4001},
    ],
    "quick": [{"H": 16, "L": 2, "heads": 2, "kv": 1, "D": 8, "I": 24, "V": 31}],
}
CRITICS: dict[Scale, tuple[int, ...]] = {"gpu": (2,), "cpu": (1, 2, 4), "quick": (2,)}
# Responses B and the longest sequence T. Lengths are even between a quarter of T and T, or all T.
BATCHES: dict[Scale, list[tuple[int, int]]] = {
    "gpu": [(4, 800), (8, 1600), (32, 1600)],  # about 2, 8 and 32 thousand tokens
    "cpu": [(16, 32)],
    "quick": [(5, 9)],
}
MAX_TOKENS = 16_384  # the trainer's default
ORACLE_TOKENS = 512  # at once, in float64
DTYPE: dict[Scale, torch.dtype] = {"gpu": torch.bfloat16, "cpu": torch.float32, "quick": torch.float32}


def cases(scale: Scale, device: torch.device) -> list[Case]:
    """Value pass and training step of each shape, batch and number of critics; none without transformers."""
    if importlib.util.find_spec("transformers") is None:
        return []
    return [
        Case(
            OP,
            f"{'step' if backward else 'value pass'}, M = {count}, H = {shape['H']}, {rows} × {width}"
            + ("" if ragged else ", no padding"),
            {"M": count, "B": rows, "T": width, **shape},
            {"backward": backward, "ragged": ragged},
            DTYPE[scale],
            device,
        )
        for shape in SHAPES[scale]
        for rows, width in BATCHES[scale]
        for count in CRITICS[scale]
        for ragged in (True, False)
        if ragged or count <= 2
        for backward in (False, True)
    ]


def sweeps(scale: Scale, device: torch.device) -> list[Sweep]:
    """The cases are themselves a table over critics and sizes."""
    return []


def inputs(case: Case, generator: torch.Generator) -> Inputs:
    """Sequences, padded on the right where they are ragged, and what their values should be."""
    rows, width = case.sizes["B"], case.sizes["T"]

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device=case.device, generator=generator)

    prompt = integers(1, width // 4, rows)
    return {
        "tokens": integers(0, case.sizes["V"], rows, width),
        "prompt_length": prompt,
        "response_length": integers(width // 4 if case.options["ragged"] else width, width + 1, rows) - prompt,
        "target": torch.randn(rows, width, device=case.device, generator=generator),
    }


def batch_of(given: Inputs) -> Any:
    """The trainer's batch of these inputs."""
    from asyppo.data.batch import Batch

    rows = len(given["tokens"])
    nothing = torch.zeros(rows, dtype=torch.int64, device=given["tokens"].device)
    return Batch(
        tokens=given["tokens"],
        prompt_length=given["prompt_length"],
        response_length=given["response_length"],
        group=nothing,
        reward=torch.zeros_like(given["target"]),
        sampler_logprob=torch.zeros_like(given["target"]),
        truncated=nothing.bool(),
        score=torch.zeros(rows, device=given["tokens"].device),
        ignored=nothing.bool(),
    )


def shares_of(case: Case) -> list[Tensor]:
    """Each critic's rows: disjoint, every M-th."""
    rows, count = case.sizes["B"], case.sizes["M"]
    return [torch.arange(m, rows, count, device=case.device) for m in range(count)]


def models_of(case: Case) -> list[Any]:
    """M value models, the same at every call."""
    from transformers import Qwen3Config, Qwen3ForTokenClassification

    size, made = case.sizes, []
    config = Qwen3Config(
        vocab_size=size["V"],
        hidden_size=size["H"],
        num_hidden_layers=size["L"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv"],
        head_dim=size["D"],
        intermediate_size=size["I"],
        max_position_embeddings=size["T"],
        num_labels=1,
    )
    config.classifier_dropout = 0.0
    for m in range(size["M"]):
        torch.manual_seed(m)
        with torch.device(case.device):
            made.append(Qwen3ForTokenClassification(config).eval())
    return made


def squared_error(micro: Any, value: Tensor, target: Tensor) -> Tensor:
    """The loss of one critic on one micro-batch."""
    return (value - target[micro.grid].to(value.dtype)).square().sum()


def gradients_of(models: list[Any]) -> dict[str, Tensor]:
    """Gradients that everything else goes through: of the heads and of the first layers' queries."""
    return {
        "d_score": torch.stack([m.score.weight.grad for m in models]),
        "d_first": torch.stack([m.model.layers[0].self_attn.q_proj.weight.grad for m in models]),
    }


def work(case: Case) -> Work:
    """Products of the layers with every token that counts, once a critic that reads it; attention left out."""
    size = case.sizes
    heads = (2 * size["heads"] + 2 * size["kv"]) * size["D"]
    weights = float(size["L"] * size["H"] * (heads + 3 * size["I"]))
    tokens = (0.625 if case.options["ragged"] else 1.0) * size["B"] * size["T"]  # on average over inputs
    if case.backward:
        return Work(6 * weights * tokens, 4 * 9.0 * size["M"] * weights, "three products a weight, once a token")
    return Work(2 * weights * tokens * size["M"], 4 * size["M"] * weights, "one product a weight, token and critic")


def required(case: Case) -> set[str]:
    """Outputs a contender has to return."""
    return {"loss", "d_score", "d_first"} if case.backward else {"value"}


def reference(case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """Each model by itself, through its own forward, in ``dtype``."""
    from asyppo.data.batch import micro_batches

    most = ORACLE_TOKENS if dtype == torch.float64 else MAX_TOKENS
    batch, shares = batch_of(inputs), shares_of(case)
    value = torch.zeros(len(shares), *batch.reward.shape, dtype=dtype, device=case.device)
    loss = torch.zeros(len(shares), dtype=dtype, device=case.device)
    models = [model.to(dtype) for model in models_of(case)]
    everything = torch.arange(len(batch), device=case.device)
    for m, model in enumerate(models):
        for micro in micro_batches(batch, shares[m] if case.backward else everything, most):
            with torch.set_grad_enabled(case.backward):
                logits = model(input_ids=micro.input_ids, attention_mask=micro.attention_mask, use_cache=False).logits
                own = micro.select(logits)[:, 0]
                value[m][micro.grid] = own.detach()
                if case.backward:
                    part = squared_error(micro, own, inputs["target"])
                    part.backward()
                    loss[m] += part.detach()
    return {"loss": loss, **gradients_of(models)} if case.backward else {"value": value}


def _run(case: Case, critics: Any) -> Run:
    from asyppo.models.critics import CriticOptimizer

    if not case.backward:
        return lambda inputs: {"value": critics.values(batch_of(inputs), MAX_TOKENS)}
    optimizer = CriticOptimizer(critics, learning_rate=0.0, weight_decay=0.0)
    shares = shares_of(case)

    def step(inputs: Inputs) -> Outputs:
        def loss(m: int, micro: Any, value: torch.Tensor) -> torch.Tensor:
            return squared_error(micro, value, inputs["target"])

        losses = critics.backward(batch_of(inputs), shares, loss, MAX_TOKENS)
        critics.collect_gradients()
        outputs = {"loss": losses, **gradients_of(critics.models)}
        optimizer.step(losses, 1e9, active=[True] * len(critics))  # no clipping, at all the work of it
        return outputs

    return step


def _stacked(case: Case) -> Run:
    from asyppo.models.critics import StackedCritics

    return _run(case, StackedCritics(models_of(case), dtype=case.dtype))


@contender(OP, "asyppo (triton)")
def stacked_triton(case: Case) -> Run:
    """Stacked, its norms, rotary embedding and activation in Triton."""
    need_gpu(case)
    return _stacked(case)


@contender(OP, "asyppo (torch)")
def stacked_torch(case: Case) -> Run:
    """Stacked, in torch throughout."""
    if case.device.type == "cuda":
        raise Absent("on a GPU the layers are Triton kernels")
    return _stacked(case)


@contender(OP, "one by one")
def one_by_one(case: Case) -> Run:
    """M models of transformers, on a GPU with Liger's kernels."""
    from asyppo.models.critics import OneByOneCritics

    models = models_of(case)
    if case.device.type == "cuda":
        need("liger_kernel")
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        for model in models:
            _apply_liger_kernel_to_instance(model=model)
    return _run(case, OneByOneCritics(models, dtype=case.dtype))
