"""The policy on packed sequences: what it says of them is what it says of padded ones, or they are not packed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.masking_utils import flash_attention_mask

from asyppo.data.batch import Batch, micro_batches
from asyppo.models.adapters import add_lora
from asyppo.models.policy import Policy
from tests.trainer.layouts import SHAPE, results

TinyLM = Callable[..., Qwen3ForCausalLM]
MakeBatch = Callable[..., Batch]
FLASH = "flash_attention_of_a_test"


def assert_alike(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * float(other.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "lora", "checkpointing", "mistral", "gpt2"])
def test_packed_is_padded(tiny_lm: TinyLM, ragged_batch: MakeBatch, kind: str) -> None:
    torch.manual_seed(0)
    models: dict[str, Callable[[], Any]] = {
        "mistral": lambda: MistralForCausalLM(
            MistralConfig(**SHAPE, num_key_value_heads=1, intermediate_size=32, sliding_window=4)
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SHAPE, n_positions=64)),
    }
    model = models.get(kind, tiny_lm)()
    if kind == "lora":
        add_lora(model, r=2, alpha=4, target_modules=None)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    policy, batch = Policy(model, gradient_checkpointing=kind == "checkpointing"), ragged_batch(longest=12)
    policy.choose_packing(True)
    assert policy.packs
    expected = results(policy, batch, packed=False)
    assert policy.padding_frac() > 0
    assert_alike(results(policy, batch, packed=True), expected)
    assert policy.padding_frac() == 0


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: BloomForCausalLM(BloomConfig(**SHAPE)), "takes no position_ids"),
        (lambda: FalconForCausalLM(FalconConfig(**SHAPE, alibi=True)), "packed sequences see each other"),
        (
            lambda: Lfm2ForCausalLM(Lfm2Config(**SHAPE, num_key_value_heads=1, layer_types=["conv", "full_attention"])),
            "layers other than attention, conv",
        ),
    ],
)
def test_families_that_cannot_are_padded(make: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    policy = Policy(make())
    policy.choose_packing("auto")  # without flash attention there is nothing to find out
    assert not [record for record in caplog.records if record.name == "asyppo"]
    policy.choose_packing(True)
    assert not policy.packs
    [record] = [record for record in caplog.records if record.name == "asyppo"]
    assert record.getMessage().startswith("policy.packing: ")
    assert why in record.getMessage()


@pytest.mark.parametrize(("budget", "at_least"), [(1, 1), (25, 1), (40, 5), (10_000, 2)])
def test_packed_micro_batches_hold_as_many_tokens_as_they_may(
    ragged_batch: MakeBatch, budget: int, at_least: int
) -> None:
    batch = ragged_batch(4, 4, longest=12)
    micros = list(micro_batches(batch, torch.arange(len(batch)), budget, at_least, packed=True))
    assert len(micros) >= at_least
    assert torch.equal(torch.cat([m.rows for m in micros]).sort().values, torch.arange(len(batch)))
    for micro in micros:
        assert micro.packing is not None
        assert micro.input_ids.shape == (1, int(batch.length[micro.rows].sum()))
        assert micro.tokens <= budget or len(micro.rows) == 1
        own = [batch.tokens[row, : batch.length[row]] for row in micro.rows]
        assert torch.equal(micro.input_ids[0], torch.cat(own))
        assert micro.packing.position_ids[0].tolist() == [i for tokens in own for i in range(len(tokens))]
        assert micro.packing.starts.diff().tolist() == [len(tokens) for tokens in own]
        assert torch.equal(
            micro.targets, batch.tokens[micro.grid[0], batch.prompt_length[micro.grid[0]] + micro.grid[1]]
        )
        assert torch.equal(micro.rows[micro.response], micro.grid[0])
    counts = [m.tokens for m in micros]
    if at_least == 1:  # greedy: no two neighbours fit into one
        assert all(one + other > budget for one, other in itertools.pairwise(counts))


class Flash:
    """Attention as flash attention is called, which notes what it is called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **kw: Any) -> Any:
        self.calls.append({"mask": mask, "autocast": torch.is_autocast_enabled("cpu"), "v": v.dtype, **kw})
        starts = [0, q.shape[2]] if kw.get("cu_seq_lens_q") is None else kw["cu_seq_lens_q"].tolist()
        k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
        parts = [
            nn.functional.scaled_dot_product_attention(
                *(x[:, :, a:b].to(v.dtype) for x in (q, k, v)), is_causal=True, scale=scaling
            )
            for a, b in itertools.pairwise(starts)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.fixture
def flash(tiny_lm: TinyLM) -> Iterator[Flash]:
    """Register it, and its mask, under a name of flash attention."""
    noted = Flash()
    AttentionInterface.register(FLASH, noted)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    yield noted
    del AttentionInterface._global_mapping[FLASH], AttentionMaskInterface._global_mapping[FLASH]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_attention_gets_cumulative_lengths_and_no_mask(
    tiny_lm: TinyLM, ragged_batch: MakeBatch, flash: Flash, dtype: torch.dtype
) -> None:
    model, batch = tiny_lm(), ragged_batch(longest=12)
    model.config._attn_implementation = FLASH
    policy = Policy(model, dtype=dtype, gradient_checkpointing=True)
    # On a CPU and in float32 flash attention does not run; what is checked there does without.
    assert not flash.calls
    assert model.config._attn_implementation == FLASH
    policy.choose_packing("auto")
    assert policy.packs
    flash.calls.clear()
    got = results(policy, batch, packed=True)
    for call in flash.calls:
        assert call["mask"] is None
        assert (call["autocast"], call["v"]) == (dtype != torch.float32, dtype)
        assert torch.equal(call["cu_seq_lens_q"], call["cu_seq_lens_k"])
        assert call["cu_seq_lens_q"].dtype == torch.int32
        assert call["max_length_q"] == call["max_length_k"] == int(call["cu_seq_lens_q"].diff().max())
    if dtype == torch.float32:
        assert_alike(got, results(Policy(tiny_lm()), batch, packed=False))


def test_no_mask_is_made_of_padding(tiny_lm: TinyLM, ragged_batch: MakeBatch, flash: Flash) -> None:
    """Which sdpa would get as [b, 1, s, s]."""
    model, batch = tiny_lm(), ragged_batch(longest=12)
    expected = results(Policy(tiny_lm()), batch, packed=False)
    AttentionMaskInterface.register(FLASH, AttentionMaskInterface()["sdpa"])
    model.config._attn_implementation = FLASH
    got = results(Policy(model), batch, packed=False)
    assert flash.calls
    assert all(call["mask"] is None for call in flash.calls)
    assert_alike(got, expected)
