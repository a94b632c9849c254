"""Stacked critics against the same models of transformers run one by one: values and every gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    MistralConfig,
    MistralForTokenClassification,
    Qwen2Config,
    Qwen2ForTokenClassification,
    Qwen3Config,
    Qwen3ForTokenClassification,
)

import asyppo.algorithm.advantage
import asyppo.models.critics.stacked as stacked_critics
from asyppo.algorithm.advantage import LearningSignal
from asyppo.checkpoint import load_checkpoint
from asyppo.config import AsyPPOConfig, ConfigError
from asyppo.data.batch import Batch, share_micro_batches
from asyppo.loop import TrainingLoop
from asyppo.models.critics import CriticOptimizer, OneByOneCritics, StackedCritics, make_critics
from asyppo.run.directory import RunDirectory
from asyppo.trainer import AsyPPOTrainer

VOCAB, PAD = 19, 0
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "num_labels": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForTokenClassification, LlamaConfig, {}),
    "llama, biases, llama3 rope": (
        LlamaForTokenClassification,
        LlamaConfig,
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "llama, dynamic rope, head of 10": (
        LlamaForTokenClassification,
        LlamaConfig,
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 6, "head_dim": 10},
    ),
    "mistral, window": (MistralForTokenClassification, MistralConfig, {"sliding_window": 4}),
    "mistral": (MistralForTokenClassification, MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2ForTokenClassification, Qwen2Config, {}),
    "qwen2, a layer with a window": (
        Qwen2ForTokenClassification,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForTokenClassification, Qwen3Config, {"head_dim": 8}),
    "qwen3, bias, yarn": (
        Qwen3ForTokenClassification,
        Qwen3Config,
        {"head_dim": 8, "attention_bias": True, "rope_parameters": YARN},
    ),
}


def make_models(family: str = "qwen3", num_critics: int = 2, **changes: Any) -> list[Any]:
    """M value models that differ in every weight, norms and biases included."""
    model_class, config_class, fields = FAMILIES[family]
    made = []
    for m in range(num_critics):
        torch.manual_seed(100 + m)
        config = config_class(**(SHAPE | fields | changes))
        config.classifier_dropout = 0.0
        model = model_class(config).eval()
        for p in model.parameters():
            if p.dim() == 1:
                p.data += 0.3 * torch.randn_like(p)
        made.append(model)
    return made


def inputs(padding: str, batch: int = 4, width: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and mask; the padding token occurs among the real ones, too."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (batch, width), generator=generator)
    ids[:, -2] = PAD
    length = torch.tensor([width, 1, width - 3, 5])[:batch, None]
    at = torch.arange(width)
    mask = {
        "none": torch.ones(batch, width, dtype=torch.bool),
        "right": at < length,
        "left": at >= width - length,
        "both": (at < length) & (at >= length // 2),
    }[padding]
    return ids, mask.long()


def one_by_one(models: list[Any], ids: Tensor, mask: Tensor, upstream: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """Values [M, B, T], 0 on padding, and the gradients of each model's parameters; inputs [M, B, T]."""
    values, gradients = [], []
    for m, model in enumerate(models):
        value = model(input_ids=ids[m], attention_mask=mask[m]).logits[..., 0] * mask[m]
        values.append(value.detach())
        grads = torch.autograd.grad((value.float() * upstream[m]).sum(), list(model.parameters()))
        gradients.append(list(grads))
    return torch.stack(values), gradients


def stacked(critics: StackedCritics, ids: Tensor, mask: Tensor, upstream: Tensor) -> tuple[Tensor, list[list[Tensor]]]:
    """The same of stacked critics; inputs [B, T] or [M, B, T]."""
    value = critics(ids, mask) * mask
    (value * upstream).sum().backward()
    critics.collect_gradients()
    gradients = [[p.grad.clone() for p in model.parameters()] for model in critics.models]
    critics.release_gradients()
    return value.detach(), gradients


def distance(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, or ||got|| where want is 0."""
    gap, norm = float((got.double() - want.double()).norm()), float(want.double().norm())
    return gap / norm if norm > 0 else gap


def assert_parity(models: list[Any], critics: StackedCritics, ids: Tensor, mask: Tensor, limit: float = 1e-5) -> None:
    """Values and every gradient within ``limit`` of the models' own, relative."""
    count = len(models)
    upstream = torch.randn(count, *ids.shape[-2:])
    each = [x if x.dim() == 3 else x.expand(count, -1, -1) for x in (ids, mask)]
    want, want_gradients = one_by_one(models, *each, upstream)
    got, gradients = stacked(critics, ids, mask, upstream)
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    assert distance(got, want) < limit
    for model, of_critic, of_model in zip(models, gradients, want_gradients, strict=True):
        names = [name for name, _ in model.named_parameters()]
        norms = dict(zip(names, (float(g.norm()) for g in of_model), strict=True))
        for name, one, other in zip(names, of_critic, of_model, strict=True):
            # What all keys have in common cancels in the softmax, and with it most of their bias's gradient.
            scale = norms[name.replace("k_proj.bias", "k_proj.weight")]
            assert float((one - other).norm()) <= limit * scale, name


def reference_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What ``varlen_attn`` is documented to compute, one sequence at a time."""
    assert cu_seq_q.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert int(cu_seq_q[-1]) == len(q)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert window_size[1] == 0
    assert max_q == max_k == int(cu_seq_q.diff().max())
    out = []
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        repeat = q.shape[1] // k.shape[1]
        keys, values = (x[start:end].repeat_interleave(repeat, dim=1) for x in (k, v))
        score = torch.einsum("qhd,khd->hqk", q[start:end], keys) * q.shape[2] ** -0.5
        at = torch.arange(end - start)
        gap = at[:, None] - at
        seen = (gap >= 0) & (gap <= window_size[0] if window_size[0] >= 0 else True)
        out.append(torch.einsum("hqk,khd->qhd", score.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(out)


# --- parity ---


@pytest.mark.parametrize("padding", ["none", "right", "left", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, padding: str) -> None:
    models = make_models(family)
    assert_parity(copy.deepcopy(models), StackedCritics(models), *inputs(padding))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("own_inputs", [False, True])
@pytest.mark.parametrize("num_critics", [1, 2, 4])
def test_number_of_critics(num_critics: int, own_inputs: bool, packed: bool) -> None:
    models = make_models("qwen3", num_critics)
    critics = StackedCritics(copy.deepcopy(models))
    critics.varlen = reference_varlen if packed else None
    ids, mask = inputs("right")
    if own_inputs:
        kinds = ("right", "left", "both", "none")[:num_critics]
        ids, mask = (torch.stack(x) for x in zip(*(inputs(kind, seed=i) for i, kind in enumerate(kinds)), strict=True))
    assert_parity(models, critics, ids, mask)


@pytest.mark.parametrize("padding", ["none", "right", "left", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences(family: str, padding: str) -> None:
    """The path of a GPU, with its attention replaced by a plain one."""
    models = make_models(family)
    critics = StackedCritics(copy.deepcopy(models))
    critics.varlen = reference_varlen
    assert_parity(models, critics, *inputs(padding))
    assert critics.padding_frac() == 0


def test_the_attention_of_torch_2_11() -> None:
    """Its signature has no ``enable_gqa``: heads are grouped unasked."""

    def older(q: Tensor, k: Tensor, *rest: Any, window_size: tuple[int, int]) -> Tensor:
        return reference_varlen(q, k, *rest, window_size=window_size, enable_gqa=q.shape[1] != k.shape[1])

    models = make_models("qwen3")
    critics = StackedCritics(copy.deepcopy(models))
    critics.varlen = older
    assert_parity(models, critics, *inputs("right"))


Errors = dict[str, float]


def mean_errors(run: Callable[[Tensor, Tensor, Tensor], Any], family: str, seeds: int = 8) -> Errors:
    """Of values, of all gradients together and of each tensor's: the distance to float64, on average over inputs."""
    names = [f"{m}: {name}" for m, model in enumerate(make_models(family)) for name, _ in model.named_parameters()]
    errors = dict.fromkeys(["value", "gradient", *names], 0.0)
    for inputs_of_run, oracle in float64_results(family, seeds):
        values, gradients = run(*inputs_of_run)
        one, other = ([g.double().flatten() for of in x for g in of] for x in (gradients, oracle[1]))
        pairs = [(values, oracle[0]), (torch.cat(one), torch.cat(other)), *zip(one, other, strict=True)]
        for name, pair in zip(errors, pairs, strict=True):
            errors[name] += distance(*pair) / seeds
    return errors


@cache
def float64_results(family: str, seeds: int) -> list[Any]:
    """Inputs of so many seeds, and what the models give for them in float64."""
    results = []
    for seed in range(seeds):
        ids, mask = inputs("right", seed=seed)
        given = ids, mask, torch.randn(2, *ids.shape, generator=torch.Generator().manual_seed(seed))
        results.append((given, plainly(family, torch.float64)(*given)))
    return results


def plainly(family: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """The models of transformers in ``dtype``."""
    models = [model.to(dtype) for model in make_models(family)]
    return lambda ids, mask, upstream: one_by_one(models, ids.expand(2, -1, -1), mask.expand(2, -1, -1), upstream)


@cache
def errors_of_transformers(family: str) -> Errors:
    """In bfloat16."""
    return mean_errors(plainly(family, torch.bfloat16), family)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama, biases, llama3 rope", "mistral, window", "qwen3"])
def test_bfloat16(family: str, packed: bool) -> None:
    """As near to float64 as transformers in bfloat16, on average over inputs, plus a tolerance.

    That is one rounding, 2^-8, of the values and of the gradient as a whole, and four of a single tensor's gradient,
    in which chance has more to say: over 4, 8 and 12 inputs the largest excess of any was 0.017, 0.011 and 0.007.
    """
    critics = StackedCritics(make_models(family), dtype=torch.bfloat16)
    critics.varlen = reference_varlen if packed else None
    ours = mean_errors(partial(stacked, critics), family)
    for name, plain in errors_of_transformers(family).items():
        roundings = 1 if name in ("value", "gradient") else 4
        assert ours[name] <= plain + roundings * 2**-8, name


def test_positions() -> None:
    """Only the values asked for, whichever way the tokens lie; the last norm and the head see no others."""
    critics = StackedCritics(make_models("qwen3", 3))
    ids, mask = inputs("right")
    value = critics(ids, mask).flatten(1)
    places = mask.flatten().nonzero()[:, 0]
    shared, own = places[[5, 1, 8]], torch.stack([places[[0, 3]], places[[7, 2]], places[[4, 4]]])
    for varlen in (None, reference_varlen):
        critics.varlen = varlen
        torch.testing.assert_close(critics(ids, mask, shared), value[:, shared])
        torch.testing.assert_close(critics(ids, mask, own), value.gather(1, own))


def test_wrong_shapes() -> None:
    critics = StackedCritics(make_models("qwen3", 3))
    ids, mask = inputs("none")
    with pytest.raises(ValueError, match=r"input_ids: got shape \[2, 4, 9\], needs \[B, T\] or \[M, B, T\], M = 3"):
        critics(ids.expand(2, -1, -1))
    with pytest.raises(ValueError, match=r"attention_mask: got shape \[4, 8\], needs that of input_ids, \[4, 9\]"):
        critics(ids, mask[:, 1:])


@pytest.mark.parametrize("packed", [False, True])
def test_masks_with_holes(packed: bool) -> None:
    """Tokens in between that are left out: as transformers has it, or refused where a window would count them."""
    ids, mask = inputs("right")
    mask[0, 3:5] = mask[0, 6] = mask[2, 2] = 0
    for family in ("qwen3", "mistral, window"):
        models = make_models(family)
        critics = StackedCritics(copy.deepcopy(models))
        critics.varlen = reference_varlen if packed else None
        if family == "qwen3":
            assert_parity(models, critics, ids, mask)
        else:
            with pytest.raises(ValueError, match=r"attention_mask: got zeros between ones, .* a window, of 4 pos"):
                critics(ids, mask)


def test_gradient_checkpointing() -> None:
    """The same gradients, and one tensor kept for each layer."""
    models = make_models("qwen3", 2, num_hidden_layers=4)
    ids, mask = inputs("right")
    assert_parity(models, StackedCritics(copy.deepcopy(models), gradient_checkpointing=True), ids, mask)
    kept = []
    for checkpointing in (False, True):
        critics, sizes = StackedCritics(copy.deepcopy(models), gradient_checkpointing=checkpointing), []
        own = {p.untyped_storage().data_ptr() for p in critics.parameters()}

        def keep(x: Tensor, sizes: list = sizes, own: set = own) -> Tensor:
            if x.untyped_storage().data_ptr() not in own:
                sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            critics(ids, mask)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


class Launches(TorchDispatchMode):
    """Counts the operators that reach a backend; views and what only allocates launch nothing."""

    NOTHING = ("view", "unsafe_view", "t", "transpose", "expand", "unsqueeze", "squeeze", "select", "slice", "split")
    NOTHING += ("detach", "alias", "permute", "empty", "new_empty", "unbind", "as_strided", "empty_like")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        self.count += func.__name__.partition(".")[0].lstrip("_") not in self.NOTHING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding", ["none", "right"])
def test_launches_of_one_for_all(padding: str) -> None:
    """Forward and backward launch the same for any number of critics, a layer no more than one of transformers."""
    ids, mask = inputs(padding)

    def count(run: Callable[[], Tensor]) -> int:
        run().sum().backward()  # what is made once is there
        with Launches() as launches:
            run().sum().backward()
        return launches.count

    def stacked_count(num_critics: int, depth: int) -> int:
        critics = StackedCritics(make_models("qwen3", num_critics, num_hidden_layers=depth))
        return count(lambda: critics(ids, mask))

    def alone_count(depth: int) -> int:
        (model,) = make_models("qwen3", 1, num_hidden_layers=depth)
        return count(lambda: model(input_ids=ids, attention_mask=mask).logits)

    assert stacked_count(1, 2) == stacked_count(2, 2) == stacked_count(4, 2)
    assert stacked_count(4, 3) - stacked_count(4, 2) <= alone_count(3) - alone_count(2)


# --- what is saved and loaded ---


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, tmp_path: Path) -> None:
    """The directories load by themselves, and the values of transformers in train mode are ours."""
    critics = StackedCritics(make_models(family, 3))
    critics.save_pretrained(tmp_path)
    ids, mask = inputs("right")
    value = critics(ids, mask)
    for m in range(3):
        loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / f"critic_{m}", num_labels=1).train()
        for (name, p), (other, q) in zip(loaded.named_parameters(), critics.models[m].named_parameters(), strict=True):
            assert name == other
            assert torch.equal(p, q), name
        own = loaded(input_ids=ids, attention_mask=mask).logits[..., 0]
        torch.testing.assert_close(own * mask, value[m] * mask, atol=1e-5, rtol=1e-5)
        assert loaded.config.classifier_dropout == 0
    again = StackedCritics.from_pretrained([tmp_path / f"critic_{m}" for m in range(3)], 3)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), critics.parameters(), strict=True))
    assert torch.equal(again(ids, mask), value)


@pytest.mark.parametrize("tied", [False, True])
def test_a_causal_language_model_loads(tied: bool, tmp_path: Path) -> None:
    fields = {name: value for name, value in SHAPE.items() if name != "num_labels"}
    lm = LlamaForCausalLM(LlamaConfig(**fields, tie_word_embeddings=tied))
    lm.save_pretrained(tmp_path)
    critics = StackedCritics.from_pretrained(tmp_path, 2)
    for m in range(2):
        assert torch.equal(critics.embed_tokens.weight[m], lm.model.embed_tokens.weight)
        assert torch.equal(critics.layers[1].mlp.down_proj.weight[m], lm.model.layers[1].mlp.down_proj.weight)
    assert not torch.equal(critics.score.weight[0], critics.score.weight[1])
    with pytest.raises(ConfigError, match=r"got 3 checkpoints, needs 1 or critic\.num_critics = 2"):
        StackedCritics.from_pretrained([tmp_path] * 3, 2)
    with pytest.raises(ConfigError, match="needs those of the policy's tokenizer, 20"):
        StackedCritics.from_pretrained(tmp_path, 2, vocab_size=20)


def test_the_same_seed_gives_both_kinds_the_same_critics(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    made = []
    for kind in (StackedCritics, OneByOneCritics):
        torch.manual_seed(3)
        made.append(kind.from_pretrained(tmp_path, 3))
    for one, other in zip(made[0].models, made[1].models, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_the_models_are_views_of_the_stack() -> None:
    """Nothing is in memory twice, wherever the stack moves."""
    critics = StackedCritics(make_models())
    for moved in (critics, critics.double().float()):
        own = {p.untyped_storage().data_ptr() for p in moved.parameters()}
        for model in moved.models:
            assert {p.untyped_storage().data_ptr() for p in model.parameters()} == own
        with torch.no_grad():
            moved.models[1].base_model.layers[1].self_attn.q_proj.weight.fill_(7.0)
        assert bool((moved.layers[1].self_attn.q_proj.weight[1] == 7).all())
        assert not bool((moved.layers[1].self_attn.q_proj.weight[0] == 7).any())


# --- what cannot be stacked ---


def test_another_architecture_falls_back_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    models = make_models("llama", hidden_act="gelu")
    config = AsyPPOConfig().critic
    critics = make_critics(models, config)
    assert isinstance(critics, OneByOneCritics)
    assert [r.getMessage() for r in caplog.records] == [
        "critics run one after another: its activation is gelu, not silu"
    ]
    with pytest.raises(ConfigError, match=r"critic\.stacked: got True, needs False for LlamaForTokenClassification"):
        StackedCritics(models)
    caplog.clear()
    config.stacked = False
    assert isinstance(make_critics(make_models(), config), OneByOneCritics)
    assert not caplog.records


def test_models_of_different_shape() -> None:
    with pytest.raises(ConfigError, match="models that differ in class or shape"):
        StackedCritics([*make_models("llama", 1), *make_models("llama", 1, num_hidden_layers=1)])


# --- shares, and training on them ---


def test_shares_side_by_side(ragged_batch: Callable[..., Batch]) -> None:
    batch = ragged_batch(num_prompts=5)
    shares = [torch.arange(0, 20, 3), torch.arange(1, 20, 3), torch.arange(2, 20, 3)[:2], torch.arange(0)]
    for budget in (1, 90, 200, 10_000):
        seen: list[list[int]] = [[], [], [], []]
        for micros in share_micro_batches(batch, shares, budget):
            assert len({m.input_ids.shape[1] for m in micros}) == 1
            rows = max(len(m.rows) for m in micros)
            assert rows == 1 or 4 * rows * micros[0].input_ids.shape[1] <= budget
            assert micros[0].input_ids.shape[1] == max(int(batch.length[m.rows].max()) for m in micros if len(m.rows))
            for m, micro in enumerate(micros):
                seen[m] += micro.rows.tolist()
                assert torch.equal(
                    micro.targets, batch.tokens[micro.grid[0], batch.prompt_length[micro.grid[0]] + micro.grid[1]]
                )
        assert [sorted(of_share) for of_share in seen] == [share.tolist() for share in shares]
    assert len(list(share_micro_batches(batch, shares, 10_000))) == 1


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("budget", [20, 10_000])
@pytest.mark.parametrize("disjoint", [True, False])
def test_shares(
    ragged_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch, disjoint: bool, layout: str, budget: int
) -> None:
    """Values, losses and gradients on unequal shares are those of critics run one after another."""
    models = make_models("qwen3", 3)
    one, critics = OneByOneCritics(copy.deepcopy(models)), StackedCritics(copy.deepcopy(models))
    critics.varlen = reference_varlen if layout == "packed" else None
    monkeypatch.setattr(stacked_critics, "WORTH_SHARING", 0 if layout == "shared" else 1)
    batch = ragged_batch()
    shares = [torch.tensor([0, 3, 5, 7]), torch.tensor([11]), torch.tensor([2, 4, 6, 8, 10])]
    if not disjoint:
        shares = [torch.arange(len(batch)), torch.tensor([3]), torch.arange(len(batch)).flip(0)]
    target = torch.randn(3, *batch.reward.shape)

    def loss(m: int, micro: Any, value: Tensor) -> Tensor:
        return (value - target[m][micro.grid]).square().sum()

    torch.testing.assert_close(critics.values(batch, budget), one.values(batch, budget), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        critics.own_values(batch, shares, budget), one.own_values(batch, shares, budget), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(critics.backward(batch, shares, loss, budget), one.backward(batch, shares, loss, budget))
    critics.collect_gradients()
    for a, b in zip(critics.models, one.models, strict=True):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            assert distance(p.grad, q.grad) < 1e-5
    critics.release_gradients()
    assert all(p.grad is None for module in (critics, *critics.models) for p in module.parameters())


def test_prompts_are_shared_where_that_saves_enough(ragged_batch: Callable[..., Batch]) -> None:
    """Not where a prompt has one response, nor by critics with a window or what is read beside the tokens."""
    critics, batch = StackedCritics(make_models("llama")), ragged_batch(2, 8, longest=2)
    everything = torch.arange(len(batch))
    assert critics.shares(batch, [everything])
    assert critics.shares(batch, [everything[:4], everything[4:8]])
    assert not critics.shares(batch, [everything[:4], everything[[0, 8]]])
    assert not StackedCritics(make_models("mistral, window")).shares(batch, [everything])
    critics.policy_inputs = ("entropy",)
    assert not critics.shares(batch, [everything])


def test_a_pass_is_within_the_budget(ragged_batch: Callable[..., Batch]) -> None:
    """The tokens of all critics count; a row that is longer by itself goes through alone."""
    batch, critics, sizes = ragged_batch(), StackedCritics(make_models("qwen3", 3)), []
    critics.register_forward_pre_hook(lambda _, args: sizes.append(args[0]))
    shares = [torch.tensor([0, 3, 5]), torch.tensor([11]), torch.tensor([2, 4, 6])]
    for budget in (90, 10):
        critics.values(batch, budget)
        critics.own_values(batch, shares, budget)
    for ids in sizes:
        count = 3 * ids[0].numel() if ids.dim() == 3 else 3 * ids.numel()
        assert count <= 90 or ids.shape[-2] == 1
    assert max(ids.shape[-2] for ids in sizes) > 1


def test_padding_is_measured(ragged_batch: Callable[..., Batch]) -> None:
    batch = ragged_batch()
    real = int(batch.length.sum())
    waste = 1 - real / batch.tokens.numel()
    assert waste > 0.2
    for kind, of_all in ((StackedCritics, 0.0), (OneByOneCritics, waste)):
        critics = kind(make_models())
        assert critics.padding_frac() == 0
        critics.values(batch, 10_000)
        assert critics.padding_frac() == pytest.approx(of_all)
        critics.values(batch, 1)  # each sequence alone
        assert critics.padding_frac() == 0
    packed = StackedCritics(make_models())
    packed.backward(batch, [torch.tensor([0]), torch.tensor([1, 2])], lambda m, micro, value: value.sum(), 10_000)
    first, second = int(batch.length[0]), int(batch.length[1:3].sum())
    assert packed.padding_frac() == pytest.approx(1 - (first + second) / (2 * max(first, second)))


@pytest.mark.parametrize("kind", [StackedCritics, OneByOneCritics])
@pytest.mark.parametrize("where", ["loss", "weight"])
def test_a_critic_that_is_not_finite_is_skipped(kind: Any, where: str, ragged_batch: Callable[..., Batch]) -> None:
    """It keeps its weights and its optimizer state; the others step exactly as without it."""
    batch, steps = ragged_batch(), []
    shares = [torch.tensor([0, 3]), torch.tensor([1, 4]), torch.tensor([2, 5])]
    for poisoned in (False, True):
        critics = kind(make_models("qwen3", 3))
        optimizer = CriticOptimizer(critics, learning_rate=1e-2, weight_decay=0.1)
        if poisoned and where == "weight":
            with torch.no_grad():
                critics.models[1].base_model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
        before = copy.deepcopy([list(model.parameters()) for model in critics.models])

        def loss(m: int, micro: Any, value: Tensor, poisoned: bool = poisoned) -> Tensor:
            bad = poisoned and where == "loss" and int(micro.rows[0]) in (1, 4)
            return value.square().sum() * (torch.inf if bad else 1.0)

        losses = critics.backward(batch, shares, loss, 10_000)
        norms = optimizer.step(losses, 1.0, active=[True] * 3)
        after = [list(model.parameters()) for model in critics.models]
        steps.append(after)
        assert [norm is None for norm in norms] == [False, poisoned, False]
        for m in range(3):
            same = all(torch.equal(p, q) or bool(p.isnan().any()) for p, q in zip(before[m], after[m], strict=True))
            assert same == (poisoned and m == 1)
            assert int(optimizer.adamw.state[after[m][0]]["step"]) == (not same)
    for m in (0, 2):
        assert all(torch.equal(p, q) for p, q in zip(steps[0][m], steps[1][m], strict=True))


def test_an_idle_critic_does_not_drift(ragged_batch: Callable[..., Batch]) -> None:
    """Momentum of earlier steps must not move a critic that has nothing to learn from in this one."""
    batch = ragged_batch()
    for kind in (StackedCritics, OneByOneCritics):
        critics = kind(make_models())
        optimizer = CriticOptimizer(critics, learning_rate=1e-2, weight_decay=0.1)
        for shares in ([torch.tensor([0]), torch.tensor([1])], [torch.tensor([2]), torch.tensor([2])[:0]]):
            before = copy.deepcopy([list(model.parameters()) for model in critics.models])
            losses = critics.backward(batch, shares, lambda m, micro, value: value.square().sum(), 10_000)
            optimizer.step(losses, 1.0, active=[len(rows) > 0 for rows in shares])
        same = [
            all(torch.equal(p, q) for p, q in zip(old, model.parameters(), strict=True))
            for old, model in zip(before, critics.models, strict=True)
        ]
        assert same == [False, True]


# --- the trainer ---


@pytest.mark.parametrize(("packed", "seed"), [(False, 0), (False, 1), (False, 2), (True, 0)])
@pytest.mark.parametrize("num_critics", [1, 2, 4])
def test_both_kinds_give_the_same_metrics(
    num_critics: int,
    packed: bool,
    seed: int,
    tiny_config: Callable[..., AsyPPOConfig],
    tiny_trainer: Callable[..., AsyPPOTrainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And drop the same tokens: all responses to a prompt begin in one state, and rounding must not choose among
    equals."""
    rows, kept, compute = [], [], asyppo.algorithm.advantage.critics_advantage

    def remember(*arguments: Any, **options: Any) -> LearningSignal:
        kept[-1].append(signal := compute(*arguments, **options))
        return signal

    monkeypatch.setattr(asyppo.algorithm.advantage, "critics_advantage", remember)
    for stack in (True, False):
        critic = {"num_critics": num_critics, "stacked": stack, "num_iterations": 2, "num_mini_batches": 2}
        config = tiny_config(
            run_name=f"run-{stack}",
            seed=seed,
            critic=critic | {"max_grad_norm": 0.3},
            max_tokens_per_micro_batch=60,
            num_generations=5,
            entropy_coef=0.05,
        )
        trainer = tiny_trainer(config, lambda completions, **_: [float(c.count("a")) for c in completions])
        if stack and packed:
            trainer.critics.varlen = reference_varlen
        kept.append([])
        rows.append([trainer.step(step).metrics for step in (1, 2, 3)])
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if not key.startswith(("timing_s/", "perf/")) and key != "critic/padding_frac":
                assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5, nan_ok=True), key
        assert 0 < other["critic/padding_frac"] < 1
        assert one["critic/vf_loss"] > 0
    assert (max(row["actor/adv_mask_frac"] for row in rows[0]) > 0.1) == (num_critics > 1)
    for one, other in zip(*kept, strict=True):
        for name in ("advantage_keep", "entropy_keep"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_checkpoint_of_either_kind_is_one_of_the_other(
    tiny_config: Callable[..., AsyPPOConfig], tiny_trainer: Callable[..., AsyPPOTrainer]
) -> None:
    """Weights and optimizer go on bit for bit, those of a critic that has never stepped, too."""

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(c.count("a")) for c in completions]

    for stacked in (True, False):
        configs = [tiny_config(run_name=f"{stacked}-{s}", critic={"stacked": s}) for s in (stacked, not stacked)]
        first, second = (tiny_trainer(config, reward) for config in configs)
        run = RunDirectory(configs[0])
        handle = next(first.critics.parameters()).register_hook(lambda g: g * torch.nan)
        assert first.step(1).metrics["critic/skipped_updates"] == (2 if stacked else 1)
        handle.remove()
        if not stacked:
            assert first.step(2).metrics["critic/skipped_updates"] == 0
        checkpoint = TrainingLoop(first).save(run, 2)
        load_checkpoint(checkpoint, second.trained())
        (one, adam), (other, other_adam) = (trainer.trained()["critics"] for trainer in (first, second))
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
            for name, value in adam.state[p].items():
                assert torch.equal(value, other_adam.state[q][name])
