"""The policy: log-probs against full logits, gradients through the ops, and heads that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3ForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from asyppo.algorithm.options import PolicyLossOptions
from asyppo.algorithm.policy_losses import PolicyLoss, PolicyTargets, gspo
from asyppo.config import ConfigError
from asyppo.data.batch import Batch, micro_batches
from asyppo.models.adapters import add_lora
from asyppo.models.hub import use_liger_kernels
from asyppo.models.policy import Objective, Policy, compute_dtype

CPU = torch.device("cpu")
TinyLM = Callable[..., Qwen3ForCausalLM]
SHAPE = {
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def naive(model: Any, batch: Batch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy [B, T] from full logits, one sequence at a time, without padding."""
    logprob, entropy = torch.zeros_like(batch.reward), torch.zeros_like(batch.reward)
    for b in range(len(batch)):
        start, end = int(batch.prompt_length[b]), int(batch.length[b])
        logits = model(batch.tokens[b : b + 1, :end]).logits[0, start - 1 : end - 1].float()
        log_p = (logits / temperature).log_softmax(-1)
        logprob[b, : end - start] = log_p.gather(1, batch.tokens[b, start:end, None])[:, 0]
        entropy[b, : end - start] = -(log_p.exp() * log_p).sum(-1)
    return logprob, entropy


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_logprobs_are_those_of_the_full_logits(
    tiny_lm: TinyLM, ragged_batch: Callable[..., Batch], temperature: float, changes: dict
) -> None:
    policy, batch = Policy(tiny_lm(**changes), temperature=temperature), ragged_batch()
    got = policy.logprobs(batch, micro_batches(batch, torch.arange(len(batch)), 30))
    with torch.no_grad():
        expected = naive(policy.model, batch, temperature)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
        assert not one[~batch.mask].any()


def test_softcapped_head(ragged_batch: Callable[..., Batch]) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**SHAPE, final_logit_softcapping=0.7, query_pre_attn_scalar=8, sliding_window=8)
    policy, batch = Policy(Gemma2ForCausalLM(config).eval(), temperature=0.8), ragged_batch()
    assert policy.softcap == 0.7
    got, _ = policy.logprobs(batch, micro_batches(batch, torch.arange(len(batch)), 30))
    with torch.no_grad():
        expected, _ = naive(policy.model, batch, 0.8)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


class ScaledBeforeTheCap(Gemma2ForCausalLM):
    """Muse's head: c tanh(s x / c)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        cap = self.config.final_logit_softcapping
        output.logits = cap * torch.tanh(3.0 * torch.atanh(output.logits / cap))
        return output


class OfOtherLogits(LlamaForCausalLM):
    """A head that is not linear."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.1 * output.logits.square()
        return output


GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 8, "final_logit_softcapping": 5.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model", "config", "scale", "softcap"),
    [
        (CohereForCausalLM, CohereConfig(**SHAPE, logit_scale=0.0625), 0.0625, None),
        (GraniteForCausalLM, GraniteConfig(**SHAPE, logits_scaling=3.0), 1 / 3, None),
        (GraniteForCausalLM, GraniteConfig(**SHAPE, logits_scaling=1.0), 1.0, None),
        (LlamaForCausalLM, LlamaConfig(**SHAPE), 1.0, None),
        (Gemma2ForCausalLM, Gemma2Config(**SHAPE | GEMMA), 1.0, 5.0),
        (ScaledBeforeTheCap, Gemma2Config(**SHAPE | GEMMA), 3.0, 5 / 3),
    ],
)
def test_a_scale_of_the_logits_is_a_temperature(
    ragged_batch: Callable[..., Batch], model: Any, config: Any, scale: float, softcap: float | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    policy, batch = Policy(model(config), temperature=0.8, dtype=dtype), ragged_batch()
    # What a configuration says is exact, even if the logits are not.
    exact = 1e-6 if model is not ScaledBeforeTheCap or dtype == torch.float32 else 1e-2
    assert (policy.logit_scale, policy.softcap) == (
        pytest.approx(scale, exact),
        softcap and pytest.approx(softcap, exact),
    )
    if dtype == torch.float32:
        got = policy.logprobs(batch, micro_batches(batch, torch.arange(len(batch)), 30))
        with torch.no_grad():
            expected = naive(policy.model, batch, 0.8)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_a_head_with_a_rule_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="policy: the logits of OfOtherLogits are not a linear head"):
        Policy(OfOtherLogits(LlamaConfig(**SHAPE)))
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM are not finite; model\.norm\.weight has weights that are"):
        Policy(model)


def test_dropout_is_off(ragged_batch: Callable[..., Batch]) -> None:
    """A dropout of the model's config would make the first update's ratio other than 1."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.5)).train()
    policy, batch = Policy(model), ragged_batch()
    micro = next(iter(micro_batches(batch, torch.arange(len(batch)), 1000)))
    assert torch.equal(policy(micro).logprob, policy(micro).logprob)


def test_gradient_of_the_loss_is_that_of_the_full_logits(tiny_lm: TinyLM, ragged_batch: Callable[..., Batch]) -> None:
    """With ratio 1 and entropy: d loss = -sum w (A d logp + c dH)."""
    batch = ragged_batch()
    policy, other = Policy(tiny_lm(), temperature=0.9), tiny_lm()
    old, _ = policy.logprobs(batch, micro_batches(batch, torch.arange(len(batch)), 1000))
    advantage, weight = torch.randn_like(batch.reward), torch.rand_like(batch.reward)
    for micro in micro_batches(batch, torch.arange(len(batch)), 30):
        targets = PolicyTargets(old, advantage, weight, batch.mask, batch.mask).at(micro.grid)
        policy(micro, Objective(targets, PolicyLossOptions(entropy_coef=0.3))).loss.backward()
    logprob, entropy = naive(other, batch, 0.9)
    (-(weight * (advantage * logprob + 0.3 * entropy))[batch.mask].sum()).backward()
    for (name, one), (_, two) in zip(policy.model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, atol=2e-5, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_bfloat16_compute_stays_near_float32(tiny_lm: TinyLM, ragged_batch: Callable[..., Batch]) -> None:
    batch = ragged_batch()
    low, full = Policy(tiny_lm(), dtype=torch.bfloat16), Policy(tiny_lm())
    got, expected = (p.logprobs(batch, micro_batches(batch, torch.arange(len(batch)), 99))[0] for p in (low, full))
    assert got.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in low.parameters())
    difference = (got - expected).abs().max()
    assert 1e-4 < difference < 0.5  # bfloat16 was at work, and no more than that


def test_a_reference_in_bfloat16_computes_what_the_policy_does(
    tiny_lm: TinyLM, ragged_batch: Callable[..., Batch]
) -> None:
    for tied in (False, True):
        policy, batch = Policy(tiny_lm(tie_word_embeddings=tied), dtype=torch.bfloat16), ragged_batch()
        reference = policy.reference()
        assert isinstance(reference, Policy)
        kept = {name: p.dtype for name, p in reference.model.named_parameters()}
        assert kept["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
        assert kept["model.embed_tokens.weight"] == kept["model.norm.weight"] == torch.float32
        micros = list(micro_batches(batch, torch.arange(len(batch)), 30))
        assert torch.equal(policy.logprobs(batch, micros).logprob, reference.logprobs(batch, micros).logprob)
        assert all(p.dtype == torch.float32 for p in policy.parameters())


@pytest.mark.parametrize("surrogate", [None, gspo])
def test_gradients_of_the_head_are_not_rounded_to_bfloat16(
    tiny_lm: TinyLM, ragged_batch: Callable[..., Batch], surrogate: PolicyLoss | None
) -> None:
    policy, batch = Policy(tiny_lm(), dtype=torch.bfloat16), ragged_batch()
    micro = next(iter(micro_batches(batch, torch.arange(len(batch)), 1000)))
    torch.manual_seed(0)
    old, advantage, weight = torch.randn_like(batch.reward), torch.randn_like(batch.reward), batch.mask / 7
    targets = PolicyTargets(old, advantage, weight, batch.mask, batch.mask).at(micro.grid)
    policy(micro, Objective(targets, PolicyLossOptions(entropy_coef=0.3), surrogate)).loss.backward()
    gradient = policy.model.lm_head.weight.grad
    assert gradient is not None
    rounded = gradient[gradient != 0] == gradient[gradient != 0].bfloat16()
    assert rounded.float().mean() < 0.05  # of float32 numbers one in 65,536 happens to be one of bfloat16


def test_liger_leaves_losses_alone(tiny_lm: TinyLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, dict[str, bool]]] = []
    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", lambda *given: asked.append(given))
    model = tiny_lm()
    use_liger_kernels(model)
    assert asked == [(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})]


def test_compute_dtype() -> None:
    assert compute_dtype("auto", CPU) == torch.float32
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16


def test_from_pretrained_has_float32_masters(tiny_lm: TinyLM, tmp_path: Path) -> None:
    tiny_lm().bfloat16().save_pretrained(tmp_path)
    policy = Policy.from_pretrained(str(tmp_path), temperature=0.7, dtype=torch.bfloat16, device=CPU)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert (policy.dtype, policy.temperature) == (torch.bfloat16, 0.7)
    assert not policy.model.training


@pytest.mark.parametrize("path", ["/no/such/directory", "empty"])
def test_a_directory_without_a_model(path: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    path = path if path.startswith("/") else str(tmp_path / path)
    with pytest.raises(ConfigError, match=f"model_name_or_path: cannot load '{path}'") as error:
        Policy.from_pretrained(path, temperature=1.0, dtype=torch.float32, device=CPU)
    assert "\n" not in str(error.value)


def test_an_attention_implementation_that_is_not_there(tiny_lm: TinyLM, tmp_path: Path) -> None:
    tiny_lm().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot load"):
        Policy.from_pretrained(
            str(tmp_path),
            temperature=1.0,
            dtype=torch.float32,
            device=CPU,
            attn_implementation="flash_attention_2",
        )


# --- gradient checkpointing ---


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_from_less(
    tiny_lm: TinyLM, ragged_batch: Callable[..., Batch], lora: bool
) -> None:
    batch = ragged_batch()
    micro = next(iter(micro_batches(batch, torch.arange(len(batch)), 1000)))
    gradients, kept, forwards = [], [], []
    for checkpointing in (False, True):
        model = tiny_lm()
        if lora:
            add_lora(model, r=2, alpha=2, target_modules=None)
        policy = Policy(model, gradient_checkpointing=checkpointing)
        calls: list[int] = []
        saved: list[int] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, into=calls: into.append(1))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, into=saved: (into.append(x.numel()), x)[1], lambda x: x
        ):
            loss = policy(micro).logprob.sum()
        loss.backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
        kept.append(sum(saved))
        forwards.append(len(calls))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert len(gradients[0]) > 0
    assert kept[1] < kept[0] / 3
    assert forwards == [1, 2]


def test_gradient_checkpointing_leaves_sampling_and_dropout_alone(ragged_batch: Callable[..., Batch]) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=0.5))
    policy, batch = Policy(model, gradient_checkpointing=True), ragged_batch()
    micro = next(iter(micro_batches(batch, torch.arange(len(batch)), 1000)))
    assert torch.equal(policy(micro).logprob, policy(micro).logprob)
    assert not any(module.training for module in policy.model.modules())
    cache = model(batch.tokens[:1], use_cache=True).past_key_values
    assert cache.get_seq_length() == batch.tokens.shape[1]


def opt(**changes: Any) -> OPTForCausalLM:
    """Has dropout inside its layers."""
    shape: dict[str, Any] = {
        "vocab_size": 19,
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "dropout": 0.5,
        "layerdrop": 0.5,
        "init_std": 0.3,
        "pad_token_id": 0,
    }
    return OPTForCausalLM(OPTConfig(**shape | changes))


def zamba2() -> Zamba2ForCausalLM:
    """Has layers in layers that can be checkpointed, both of them."""
    return Zamba2ForCausalLM(
        Zamba2Config(
            **SHAPE | {"num_hidden_layers": 2, "num_key_value_heads": 2},
            attention_head_dim=16,
            layers_block_type=["mamba", "hybrid"],
            hybrid_layer_ids=[1],
            mamba_d_state=4,
            mamba_ngroups=1,
            n_mamba_heads=2,
            mamba_headdim=16,
            num_mem_blocks=1,
            chunk_size=8,
        )
    )


@pytest.mark.parametrize("make", [opt, zamba2])
def test_gradient_checkpointing_is_exact(ragged_batch: Callable[..., Batch], make: Callable[..., Any]) -> None:
    batch = ragged_batch()
    micro = next(iter(micro_batches(batch, torch.arange(len(batch)), 1000)))
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        policy = Policy(make(), gradient_checkpointing=checkpointing)
        logprob = policy(micro).logprob
        logprob.sum().backward()
        found.append([logprob.detach(), *(p.grad for p in policy.parameters() if p.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_layers_that_give_another_gradient_computed_again_are_refused(tiny_lm: TinyLM) -> None:
    model = tiny_lm()
    calls: list[int] = []

    def drifting(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        calls.extend([1] * torch.is_grad_enabled())
        return output * (1 + 0.1 * (len(calls) % 3))

    model.model.layers[1].input_layernorm.register_forward_hook(drifting)
    with pytest.raises(
        ConfigError, match=r"policy\.gradient_checkpointing: got True, needs False for Qwen3Model: .* off"
    ):
        Policy(model, gradient_checkpointing=True)


# --- what may be loaded ---


def test_pickle_files_are_not_loaded(tiny_lm: TinyLM, tmp_path: Path) -> None:
    model = tiny_lm()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=f"model_name_or_path: '{tmp_path}' has its weights as pickle files.*safetensors"
    ):
        Policy.from_pretrained(str(tmp_path), temperature=1.0, dtype=torch.float32, device=CPU)


def test_code_of_a_model_runs_only_when_asked(tiny_lm: TinyLM, tmp_path: Path) -> None:
    tiny_lm().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config["model_type"] = "own"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
        "class OwnForCausalLM(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    load = partial(Policy.from_pretrained, str(tmp_path), temperature=1.0, dtype=torch.float32, device=CPU)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load()
    assert type(load(trust_remote_code=True).model).__name__ == "OwnForCausalLM"
