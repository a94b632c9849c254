"""The mini-critics: values at the right position, heads of their own, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
    Qwen3ForTokenClassification,
)

from asyppo.batch import Batch, micro_batches
from asyppo.config import ConfigError
from asyppo.critics import Critics

CPU = torch.device("cpu")
VOCAB = 19
TinyLM = Callable[..., Qwen3ForCausalLM]
TinyCritic = Callable[..., Qwen3ForTokenClassification]


def load(path: Path, num_critics: int = 2, vocab_size: int = VOCAB) -> Critics:
    """Load float32 critics on the CPU."""
    return Critics.from_pretrained(str(path), num_critics, vocab_size=vocab_size, dtype=torch.float32, device=CPU)


def naive(model: Qwen3ForTokenClassification, batch: Batch) -> torch.Tensor:
    """Values [B, T] of the model's own forward, one sequence at a time, read before each token."""
    value = torch.zeros_like(batch.reward)
    for b in range(len(batch)):
        start, end = int(batch.prompt_length[b]), int(batch.length[b])
        value[b, : end - start] = model(batch.tokens[b : b + 1, :end]).logits[0, start - 1 : end - 1, 0]
    return value


@torch.no_grad()
def test_values(tiny_critic: TinyCritic, ragged_batch: Callable[..., Batch]) -> None:
    critics, batch = Critics([tiny_critic(seed=m) for m in range(3)]), ragged_batch()
    value = critics.values(batch, micro_batches(batch, torch.arange(len(batch)), 30))
    assert value.shape == (3, *batch.mask.shape)
    for m in range(3):
        torch.testing.assert_close(value[m], naive(critics.models[m], batch), atol=1e-5, rtol=1e-5)
    chosen = critics.values(batch, micro_batches(batch, torch.tensor([1, 4]), 30), members=[2])
    torch.testing.assert_close(chosen[0, [1, 4]], value[2, [1, 4]], atol=1e-5, rtol=1e-5)
    assert not chosen[0, [0, 2, 3, 5]].any()


def test_only_chosen_critics_get_gradients(tiny_critic: TinyCritic, ragged_batch: Callable[..., Batch]) -> None:
    critics, batch = Critics([tiny_critic(seed=m) for m in range(2)]), ragged_batch()
    micro = next(iter(micro_batches(batch, torch.arange(len(batch)), 1000)))
    critics(micro, [1]).value.sum().backward()
    assert all(p.grad is None for p in critics.models[0].parameters())
    assert critics.models[1].score.weight.grad.abs().sum() > 0


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


def test_dropout_is_off_even_in_train_mode(tmp_path: Path, ragged_batch: Callable[..., Batch]) -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=32)).save_pretrained(tmp_path)
    critics, batch = load(tmp_path), ragged_batch()
    micro = next(iter(micro_batches(batch, torch.arange(len(batch)), 1000)))
    critics.train()
    assert torch.equal(critics(micro).value, critics(micro).value)
    assert all(module.p == 0 for module in critics.modules() if isinstance(module, torch.nn.Dropout))
    assert critics.models[0].config.classifier_dropout == 0  # in what is saved, too


def test_attention_dropout_is_off(tmp_path: Path, ragged_batch: Callable[..., Batch]) -> None:
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**shape, intermediate_size=32, attention_dropout=0.5)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    critics, batch = load(tmp_path), ragged_batch()
    micro = next(iter(micro_batches(batch, torch.arange(len(batch)), 1000)))
    assert torch.equal(critics(micro).value, critics(micro).value)


def test_another_vocabulary_is_refused(tiny_lm: TinyLM, tmp_path: Path) -> None:
    tiny_lm().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"critic\.model_name_or_path: .* vocabulary of 19 tokens, needs .* 20"):
        load(tmp_path, vocab_size=20)


def test_a_model_without_a_linear_head_called_score(tmp_path: Path, ragged_batch: Callable[..., Batch]) -> None:
    """GPT-2 calls its head ``classifier``: it either works or is refused, in words."""
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"critic\.model_name_or_path: GPT2ForTokenClassification"):
        load(tmp_path)


def test_save_and_load(tiny_critic: TinyCritic, ragged_batch: Callable[..., Batch], tmp_path: Path) -> None:
    critics, batch = Critics([tiny_critic(seed=m) for m in range(2)]), ragged_batch()
    critics.save_pretrained(tmp_path)
    for m in range(2):
        loaded = AutoModelForTokenClassification.from_pretrained(tmp_path / f"critic_{m}").eval()
        with torch.no_grad():
            torch.testing.assert_close(naive(loaded, batch), naive(critics.models[m], batch))
