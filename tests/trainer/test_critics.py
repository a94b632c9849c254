"""The mini-critics: values at the right position, heads of their own, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
    Qwen3ForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from asyppo.config import ConfigError, CriticConfig
from asyppo.data.batch import Batch, micro_batches
from asyppo.models.critics import Critics, OneByOneCritics, StackedCritics, load_critics
from asyppo.models.critics.loading import value_head

CPU = torch.device("cpu")
VOCAB = 19
KINDS = [StackedCritics, OneByOneCritics]
TinyLM = Callable[..., Qwen3ForCausalLM]
TinyCritic = Callable[..., Qwen3ForTokenClassification]


def load(path: Path, num_critics: int = 2, vocab_size: int = VOCAB, **fields: Any) -> Critics:
    """Load float32 critics on the CPU."""
    config = CriticConfig(**fields)
    return load_critics(str(path), num_critics, config, vocab_size=vocab_size, dtype=torch.float32, device=CPU)


def naive(model: Any, batch: Batch) -> torch.Tensor:
    """Values [B, T] of the model's own forward, one sequence at a time, read before each token."""
    value = torch.zeros_like(batch.reward)
    for b in range(len(batch)):
        start, end = int(batch.prompt_length[b]), int(batch.length[b])
        value[b, : end - start] = model(batch.tokens[b : b + 1, :end]).logits[0, start - 1 : end - 1, 0]
    return value


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: Any, tiny_critic: TinyCritic, ragged_batch: Callable[..., Batch]) -> None:
    critics, batch = kind([tiny_critic(seed=m) for m in range(3)]), ragged_batch()
    expected = torch.stack([naive(model, batch) for model in critics.models])
    for max_tokens in (1, 30, 10_000):
        value = critics.values(batch, max_tokens)
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
        shares = [torch.tensor([1, 4]), torch.tensor([0])[:0], torch.tensor([7, 4])]
        own = torch.zeros_like(expected)
        for m, rows in enumerate(shares):
            own[m, rows] = expected[m, rows]
        torch.testing.assert_close(critics.own_values(batch, shares, max_tokens), own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_critic_gets_gradients_of_its_own_loss(
    kind: Any, tiny_critic: TinyCritic, ragged_batch: Callable[..., Batch]
) -> None:
    critics, batch = kind([tiny_critic(seed=m) for m in range(2)]), ragged_batch()
    shares = [torch.arange(0), torch.arange(len(batch))]
    losses = critics.backward(batch, shares, lambda m, micro, value: value.sum(), 1000)
    critics.collect_gradients()
    grads = [[0.0 if p.grad is None else float(p.grad.abs().sum()) for p in m.parameters()] for m in critics.models]
    assert max(grads[0]) == 0
    assert min(grads[1]) > 0
    torch.testing.assert_close(losses, torch.stack([torch.zeros(()), critics.values(batch, 1000)[1].sum()]))


def test_from_pretrained_gives_each_critic_a_head_of_its_own(tiny_lm: TinyLM, tmp_path: Path) -> None:
    lm = tiny_lm()
    lm.save_pretrained(tmp_path)
    critics = load(tmp_path, 3)
    assert len(critics) == 3
    for model in critics.models:
        torch.testing.assert_close(model.base_model.embed_tokens.weight, lm.model.embed_tokens.weight)
    heads = [model.score.weight for model in critics.models]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    bodies = [model.base_model.layers[0].mlp.up_proj.weight for model in critics.models]
    bodies[0].data.zero_()
    assert bodies[1].abs().sum() > 0  # no weights are shared
    torch.manual_seed(7)
    first = load(tmp_path).models[0].score.weight
    torch.manual_seed(7)
    assert torch.equal(first, load(tmp_path).models[0].score.weight)


@pytest.mark.parametrize("stacked", [True, False])
def test_dropout_is_off_even_in_train_mode(stacked: bool, tmp_path: Path, ragged_batch: Callable[..., Batch]) -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=32)).save_pretrained(tmp_path)
    critics, batch = load(tmp_path, stacked=stacked), ragged_batch()
    critics.train()
    assert torch.equal(critics.values(batch, 1000), critics.values(batch, 1000))
    for model in critics.models:
        assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert critics.models[0].config.classifier_dropout == 0  # in what is saved, too


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_attention_dropout_is_off(
    stacked: bool, checkpointing: bool, tmp_path: Path, ragged_batch: Callable[..., Batch]
) -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**shape, intermediate_size=32, attention_dropout=0.5)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    critics, batch = load(tmp_path, stacked=stacked, gradient_checkpointing=checkpointing), ragged_batch()
    assert torch.equal(critics.values(batch, 1000), critics.values(batch, 1000))


def test_too_small_a_vocabulary_is_refused(tiny_lm: TinyLM, tmp_path: Path) -> None:
    tiny_lm().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"critic\.model_name_or_path: .* embeddings of 19 tokens, needs .* 20"):
        load(tmp_path, vocab_size=20)


FAMILIES: dict[str, dict[str, Any]] = {
    # Token classifiers whose head is called classifier.
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "gpt_neox": {},
    "falcon": {},
    "bloom": {"n_layer": 1, "n_head": 2},
    "mpt": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 32, "expansion_ratio": 2},
    # No token classifier; and one whose hidden states come out narrower than they are inside.
    "gptj": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 8, "do_layer_norm_before": False, "ffn_dim": 32},
    "mamba": {"state_size": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_whose_head_is_called_or_made_otherwise(
    family: str, tmp_path: Path, ragged_batch: Callable[..., Batch]
) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model(family, **shape | FAMILIES[family], vocab_size=VOCAB)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    # Checkpointed: OPT's layers have dropout of their own, 0.1 by default, which stays off.
    critics, batch = load(tmp_path, gradient_checkpointing=True), ragged_batch()
    heads = [value_head(model) for model in critics.models]
    assert not torch.equal(heads[0].weight, heads[1].weight)
    value = critics.values(batch, 1000)
    for m, model in enumerate(critics.models):
        for b in range(len(batch)):
            start, end = int(batch.prompt_length[b]), int(batch.length[b])
            hidden = model.base_model(input_ids=batch.tokens[b : b + 1, :end]).last_hidden_state[0, start - 1 : end - 1]
            torch.testing.assert_close(value[m, b, : end - start], heads[m](hidden)[:, 0], atol=1e-5, rtol=1e-4)
    critics.backward(batch, [torch.arange(len(batch))] * 2, lambda m, micro, value: value.square().sum(), 1000)
    assert all(float(head.weight.grad.abs().max()) > 0 for head in heads)
    critics.save_pretrained(tmp_path)
    for m in range(2):
        again = load(tmp_path / f"critic_{m}", 1).values(batch, 1000)
        torch.testing.assert_close(again[0], value[m], atol=1e-6, rtol=1e-6)


def bert() -> BertForMaskedLM:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=VOCAB, **shape))


def t5() -> T5ForConditionalGeneration:
    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [bert, t5])
def test_a_model_that_reads_what_comes_later(make: Callable[[], Any], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"critic\.model_name_or_path: .*(Bert|T5)\w+\) reads tokens behind the one"):
        load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: Any, tiny_critic: TinyCritic, ragged_batch: Callable[..., Batch], tmp_path: Path) -> None:
    critics, batch = kind([tiny_critic(seed=m) for m in range(2)]), ragged_batch()
    critics.save_pretrained(tmp_path)
    for m in range(2):
        loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / f"critic_{m}").eval()
        with torch.no_grad():
            torch.testing.assert_close(naive(loaded, batch), naive(critics.models[m], batch))


def test_gradient_checkpointing_one_by_one(tiny_critic: TinyCritic, ragged_batch: Callable[..., Batch]) -> None:
    """The same gradients, and less is kept for them."""
    batch, kept = ragged_batch(), []
    models = [
        OneByOneCritics([tiny_critic(num_hidden_layers=3)], gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    ]
    for critics in models:
        sizes: list[int] = []

        def keep(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            critics(0, next(iter(micro_batches(batch, torch.arange(len(batch)), 1000))))
        kept.append(sum(sizes))
        critics.backward(batch, [torch.arange(len(batch))], lambda m, micro, value: value.square().sum(), 1000)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert kept[1] < kept[0] / 2


def test_a_family_without_a_token_classifier(
    tmp_path: Path, ragged_batch: Callable[..., Batch], caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma 3: its backbone and a value head, one by one, saved and loaded as they are."""
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "lm")
    critics, batch = load(tmp_path / "lm"), ragged_batch()
    assert isinstance(critics, OneByOneCritics)
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["critics run one after another"]
    value = critics.values(batch, 1000)
    assert value.std(dim=0).max() > 0
    critics.save_pretrained(tmp_path)
    for m in range(2):
        directory = tmp_path / f"critic_{m}"
        body, head = AutoModel.from_pretrained(directory), load_file(directory / "value_head.safetensors")
        for b in range(len(batch)):
            start, end = int(batch.prompt_length[b]), int(batch.length[b])
            hidden = body(batch.tokens[b : b + 1, :end]).last_hidden_state[0, start - 1 : end - 1]
            torch.testing.assert_close(value[m, b, : end - start], (hidden @ head["weight"].T + head["bias"])[:, 0])
        again = load(directory, 1)
        assert torch.equal(again.values(batch, 1000)[0], value[m])
