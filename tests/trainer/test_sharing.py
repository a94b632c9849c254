"""The policy on sequences that share their prompts: what it says of them is what it says of padded ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3ForCausalLM,
)

from asyppo.data.batch import Batch, empty_micro_batch, micro_batch, micro_batches
from asyppo.models.adapters import add_lora
from asyppo.models.policy import Policy
from asyppo.models.sharing import why_not_shared
from tests.trainer.layouts import SHAPE, results

TinyLM = Callable[..., Qwen3ForCausalLM]
MakeBatch = Callable[..., Batch]


def mistral(**changes: Any) -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=1, intermediate_size=32, **changes))


@pytest.mark.parametrize("kind", ["qwen3", "lora", "checkpointing", "mistral", "gpt2"])
def test_shared_is_padded(tiny_lm: TinyLM, ragged_batch: MakeBatch, kind: str) -> None:
    models: dict[str, Callable[[], Any]] = {
        "mistral": lambda: mistral(sliding_window=None),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SHAPE, n_positions=64)),
    }
    model = models.get(kind, tiny_lm)()
    if kind == "lora":
        add_lora(model, r=2, alpha=4, target_modules=None)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    policy = Policy(model, gradient_checkpointing=kind == "checkpointing")
    policy.choose_packing("auto")
    assert policy.shares
    for batch in (ragged_batch(), ragged_batch(2, 8, longest=2)):  # of the second, some groups are of one length
        expected = results(policy, batch, 20, shared=False)
        assert policy.padding_frac() > 0
        for got, one in zip(results(policy, batch, 20, shared=True), expected, strict=True):
            torch.testing.assert_close(got, one, atol=2e-5 * float(one.abs().max()), rtol=1e-5)
        assert policy.padding_frac() == 0
    policy(empty_micro_batch(batch, shared=True))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: mistral(sliding_window=4), "attention with sliding_window"),
        (lambda: mistral(attn_implementation="eager"), "is eager"),
        (
            lambda: Lfm2ForCausalLM(Lfm2Config(**SHAPE, num_key_value_heads=1, layer_types=["conv", "full_attention"])),
            "layers other than attention, conv",
        ),
    ],
)
def test_families_that_cannot_are_padded(make: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(make())
    policy.choose_packing("auto")
    assert not policy.shares
    assert why in str(why_not_shared(policy.model, policy, policy.dtype))
    assert not [record for record in caplog.records if record.name == "asyppo"]


def test_responses_that_see_each_other_are_found_out(tiny_lm: TinyLM, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(tiny_lm())
    monkeypatch.setattr("asyppo.models.policy.SHARED", "something_else")
    assert "share a prompt" in str(why_not_shared(policy.model, policy, policy.dtype))


def test_sequences_are_padded_where_that_is_asked_for(tiny_lm: TinyLM) -> None:
    policy = Policy(tiny_lm())
    policy.choose_packing(False)
    assert not policy.shares


def test_a_prompt_is_there_once(ragged_batch: MakeBatch) -> None:
    batch = ragged_batch(2, 3)
    micro = micro_batch(batch, [2, 0, 4], shared=True)
    assert micro.sharing is not None
    prompt, length = batch.prompt_length.tolist(), batch.length.tolist()
    of = [(2, 0, length[2]), (0, prompt[0], length[0]), (4, 0, length[4])]
    assert micro.input_ids[0].tolist() == [token for b, a, z in of for token in batch.tokens[b, a:z].tolist()]
    assert micro.sharing.position_ids[0].tolist() == [place for _, a, z in of for place in range(a, z)]
    assert micro.tokens == micro.input_ids.numel()
    padded = micro_batch(batch, [2, 0, 4])
    assert torch.equal(micro.targets, padded.targets)
    # The token that predicts is the one before, wherever it lies.
    for one in (micro, padded):
        before = batch.tokens[one.grid[0], batch.prompt_length[one.grid[0]] + one.grid[1] - 1]
        assert torch.equal(one.input_ids[one.predicts], before)


@pytest.mark.parametrize(("budget", "at_least"), [(1, 1), (12, 1), (20, 5), (10_000, 2)])
def test_rows_of_a_prompt_go_together(ragged_batch: MakeBatch, budget: int, at_least: int) -> None:
    batch = ragged_batch(4, 4)
    micros = list(micro_batches(batch, torch.randperm(len(batch)), budget, at_least, shared=True))
    assert len(micros) >= at_least
    rows = torch.cat([m.rows for m in micros])
    assert torch.equal(rows.sort().values, torch.arange(len(batch)))
    prompts = [batch.prompt_number[row] for row in rows.tolist()]
    assert prompts == sorted(prompts)
    assert all(m.tokens <= budget or len(m.rows) == 1 for m in micros)
