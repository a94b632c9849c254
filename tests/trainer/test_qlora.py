"""Adapters on a model in 4 bits: the widened weights with the same adapters, in plain transformers and peft, are the
reference; sampling, saving, resuming and what cannot be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from asyppo.algorithm.options import PolicyLossOptions
from asyppo.algorithm.policy_losses import PolicyTargets
from asyppo.checkpoint import load_checkpoint, publish_checkpoint, take_checkpoint
from asyppo.config import AsyPPOConfig, ConfigError, CriticConfig, DistributedConfig, PolicyConfig
from asyppo.data.batch import Batch, micro_batches
from asyppo.distributed.processes import make_mesh, processes
from asyppo.distributed.sharding import WholeCopy
from asyppo.models.critics import LoraCritics
from asyppo.models.policy import Objective, Policy
from asyppo.models.quantized import (
    BYTES_PER_PARAMETER,
    is_in_4_bits,
    kept_whole,
    layers_in_4_bits,
    options_of_4_bits,
    widened,
)
from asyppo.rollout.samplers import GenerateSampler
from asyppo.rollout.samplers.base import ModelSampler
from asyppo.rollout.samplers.continuous import ContinuousBatchingSampler
from asyppo.rollout.samplers.decode import DecodingSampler
from asyppo.trainer import AsyPPOTrainer

Make = Callable[..., Any]
CPU = torch.device("cpu")
LORA: dict[str, Any] = {"r": 4, "alpha": 8, "target_modules": None}
WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def base(tiny_lm: Make, tmp_path: Path) -> str:
    """A model in a directory."""
    tiny_lm(**WIDE).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def in_4_bits(base: str) -> Callable[..., Policy]:
    """Load ``base`` in 4 bits with new adapters that matter."""

    def make(dtype: torch.dtype = torch.float32, **changes: Any) -> Policy:
        torch.manual_seed(1)
        made = Policy.from_pretrained(
            base, temperature=1.0, dtype=dtype, device=CPU, lora=LORA | changes, load_in_4bit=True
        )
        scramble(made)
        return made

    return make


def scramble(module: nn.Module) -> None:
    """Make new adapters matter."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)


def widen(base: str, adapted: Any) -> Any:
    """The model of ``base`` with what the weights of ``adapted`` stand for, and copies of its adapters."""
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain.add_adapter(copy.deepcopy(adapted.peft_config["default"]))
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(widened(adapted.get_parameter(name)))
    return plain.eval()


def values(of: Policy, batch: Batch) -> Any:
    """Log-probs and entropies of the whole batch."""
    return of.logprobs(batch, micro_batches(batch, torch.arange(len(batch)), 1000))


def gradients(policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
    """Of PPO's loss with an entropy bonus, over the whole batch."""
    everything = torch.arange(len(batch))
    [micro] = micro_batches(batch, everything, 1000)
    keep = torch.ones_like(batch.mask)
    targets = PolicyTargets(batch.sampler_logprob, batch.reward + 1.0, batch.mask.float(), keep, keep)
    policy(micro, Objective(targets.at(micro.grid), PolicyLossOptions(entropy_coef=0.1))).loss.backward()
    return {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_and_gradients_are_those_of_the_widened_weights(
    in_4_bits: Make, base: str, ragged_batch: Make, dtype: torch.dtype
) -> None:
    batch, policy = ragged_batch(), in_4_bits(dtype)
    kinds = {type(layer).__name__ for layer in policy.model.modules() if "4bit" in type(layer).__name__}
    assert len(kinds) > 0
    assert not is_in_4_bits(policy.model.get_output_embeddings())
    plain = Policy(widen(base, policy.model), dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for got, want in zip(values(policy, batch), values(plain, batch), strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()
    got, want = gradients(policy, batch), gradients(plain, batch)
    assert got.keys() == want.keys()
    assert all("lora_" in name for name in got)
    for name, gradient in got.items():
        assert (gradient - want[name]).norm() <= tolerance * want[name].norm(), name


def test_adapters_are_trained_in_float32(in_4_bits: Make) -> None:
    """Steps of a usual learning rate would be lost in bfloat16."""
    assert {p.dtype for p in in_4_bits(torch.bfloat16).parameters() if p.requires_grad} == {torch.float32}


def test_bytes(in_4_bits: Make) -> None:
    """Blocks of this small model's scales are not full."""
    for layer in layers_in_4_bits(in_4_bits().model):
        state, count = layer.weight.quant_state, widened(layer.weight).numel()
        parts = (layer.weight.data, state.absmax, state.state2.absmax)
        assert sum(part.numel() * part.element_size() for part in parts) <= BYTES_PER_PARAMETER * count + 4


def test_weights_for_a_sampler_that_holds_them_are_merged(in_4_bits: Make, base: str) -> None:
    policy = in_4_bits(target_modules=["q_proj", "down_proj"])
    plain = widen(base, policy.model)
    merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    given = {name: weight.clone() for name, weight in policy.weights()}
    assert given.keys() == merged.state_dict().keys()
    merged.load_state_dict(given)
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(merged(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_reference_is_the_model_under_the_adapters(in_4_bits: Make, base: str, ragged_batch: Make) -> None:
    batch, policy = ragged_batch(), in_4_bits()
    plain = widen(base, policy.model)
    plain.disable_adapters()
    want = values(Policy(plain), batch)[0]
    torch.testing.assert_close(
        policy.reference().logprobs(batch, micro_batches(batch, torch.arange(len(batch)), 1000)).logprob, want
    )
    assert not torch.equal(values(policy, batch)[0], want)


@pytest.mark.parametrize("kind", [GenerateSampler, DecodingSampler, ContinuousBatchingSampler])
def test_responses_are_sampled_from_it(in_4_bits: Make, kind: type[ModelSampler]) -> None:
    policy = in_4_bits()
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([6])]
    sampler = kind(policy.model, eos_token_ids=[1], pad_token_id=0)
    responses = sampler.sample(prompts, max_completion_length=6, temperature=1.0)  # type: ignore[attr-defined]
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logprob = policy.model(torch.cat([prompt, response.tokens])[None]).logits[0].log_softmax(-1)
        want = logprob[len(prompt) - 1 : -1].gather(1, response.tokens[:, None])[:, 0]
        torch.testing.assert_close(response.logprob, want, rtol=1e-4, atol=1e-4)


def test_a_run_goes_on_from_its_adapters(
    base: str, tiny_critic: Make, tiny_config: Make, tokenizer: Any, prompts: Any, tmp_path: Path
) -> None:
    tiny_critic(**WIDE).save_pretrained(tmp_path / "critic")
    config = tiny_config(
        policy=PolicyConfig(model_name_or_path=base, use_peft=True, load_in_4bit=True),
        critic={"lora_r": 2, "load_in_4bit": True},
        optim="adamw_8bit",
        beta=0.1,
    )

    def make() -> AsyPPOTrainer:
        torch.manual_seed(0)
        return AsyPPOTrainer(
            policy=base,
            critics=str(tmp_path / "critic"),
            tokenizer=tokenizer,
            reward_funcs=[lambda completions, **_: [float(c.count("a")) for c in completions]],
            train_dataset=prompts,
            config=config,
        )

    trainer = make()
    assert isinstance(trainer.critics, LoraCritics)
    assert next(layers_in_4_bits(trainer.critics), None) is not None
    trainer.step(1)
    path = publish_checkpoint(
        take_checkpoint(tmp_path, 1, trainer.policy, trainer.critics, tokenizer, trainer.trained(), {}, copied=True)()
    )
    saved = FileSystemReader(path / "state").read_metadata().state_dict_metadata
    assert {name for name in saved if name.startswith("policy.model.") and "lora_" not in name} == set()
    again = make()
    load_checkpoint(path, again.trained())
    for one in (trainer, again):
        one.step(2)
    weights, others = (dict(one.policy.named_parameters()) for one in (trainer, again))
    assert all(torch.equal(weights[name], others[name]) for name in weights)

    # The adapters alone are saved, over the base by name.
    assert {file.name for file in (path / "policy").glob("*.safetensors")} == {"adapter_model.safetensors"}
    loaded = Policy.from_pretrained(
        str(path / "policy"), temperature=1.0, dtype=torch.float32, device=CPU, load_in_4bit=True
    )
    load_checkpoint(path, trainer.trained())
    ids = torch.arange(3, 12)[None]
    assert is_in_4_bits(loaded.model)
    assert torch.equal(loaded.model(ids).logits, trainer.policy.model(ids).logits)


def test_the_base_is_there_once(in_4_bits: Make) -> None:
    """Adapters are sharded, and copied to sample with; what lies under them is whole, and in the copy, too."""
    policy, ids = in_4_bits(), torch.arange(3, 12)[None]
    logits, sent = policy.model(ids).logits, {name: weight.clone() for name, weight in policy.weights()}
    base, config = kept_whole(policy), DistributedConfig(shard_single=True)
    places = {p.data_ptr() for p in base}
    copy = WholeCopy(policy, torch.float32, CPU, base)
    own = [p for p in copy.module.parameters() if p not in base]
    with processes(config):
        policy.shard(make_mesh(config, CPU))
        assert {p.data_ptr() for p in policy.parameters() if not isinstance(p, DTensor)} == places
        assert all(p.requires_grad == isinstance(p, DTensor) for p in policy.parameters())
        with copy.of(policy):
            assert torch.equal(copy.module.model(ids).logits, logits)
        assert sum(p.untyped_storage().size() for p in own) == 0
        given = {name: weight.clone() for name, weight in policy.weights()}
        assert given.keys() == sent.keys()
        assert all(torch.equal(given[name], weight) for name, weight in sent.items())
    for layer, twin in zip(layers_in_4_bits(policy), layers_in_4_bits(copy.module), strict=True):
        assert getattr(twin, "quant_state", None) is getattr(layer, "quant_state", None)  # the scales


def test_each_process_loads_to_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    assert options_of_4_bits(torch.device("cuda"), torch.float32)["device_map"] == {"": torch.device("cuda", 3)}


def test_critics_on_a_backbone_in_4_bits(tmp_path: Path, tiny_critic: Make) -> None:
    tiny_critic(**WIDE).save_pretrained(tmp_path / "critic")
    how: dict[str, Any] = {"r": 3, "alpha": 5.0}
    critics = LoraCritics.from_pretrained(tmp_path / "critic", 2, **how, load_in_4bit=True)
    scramble(critics)
    plain = LoraCritics.from_pretrained(tmp_path / "critic", 2, **how)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(widened(critics.get_parameter(name)))
    assert len(list(layers_in_4_bits(critics))) == 7
    ids = torch.randint(3, 19, (4, 9))
    upstream = torch.randn(2, 4, 9)
    for one in (critics, plain):
        (one(ids) * upstream).sum().backward()
    torch.testing.assert_close(critics(ids), plain(ids), rtol=1e-5, atol=1e-5)
    for name, p in plain.trained_parameters():
        gradient = critics.get_parameter(name).grad
        assert gradient is not None
        assert (gradient - p.grad).norm() <= 1e-5 * p.grad.norm(), name

    # What is saved loads over the base, in 4 bits or whole.
    critics.save_pretrained(tmp_path / "saved")
    paths = [tmp_path / "saved" / f"critic_{m}" for m in range(2)]
    again = LoraCritics.from_pretrained(paths, 2, **how, load_in_4bit=True)
    assert torch.equal(again(ids), critics(ids))


def test_what_cannot_be(base: str, tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: dict[str, Any] = {"temperature": 1.0, "dtype": torch.float32, "device": CPU}
    with pytest.raises(ConfigError, match=r"policy\.load_in_4bit: got True, needs policy.use_peft"):
        Policy.from_pretrained(base, **plain, load_in_4bit=True)
    how = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ConfigError, match=r"policy: got a model in 4 bits, needs adapters"):
        Policy(AutoModelForCausalLM.from_pretrained(base, quantization_config=how))
    with pytest.raises(ConfigError, match=r"critic\.load_in_4bit: got True, needs False without critic.lora_r"):
        AsyPPOConfig(critic=CriticConfig(load_in_4bit=True)).validate()
    config = tiny_config(policy=PolicyConfig(load_in_4bit=True, use_peft=True))
    with pytest.raises(ConfigError, match=r"policy\.load_in_4bit: got True and a Policy with whole weights, needs one"):
        tiny_trainer(config, lambda completions, **_: [0.0])
    monkeypatch.setattr("asyppo.models.quantized.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"policy\.load_in_4bit: got True, needs bitsandbytes, which is not"):
        tiny_trainer(config, lambda completions, **_: [0.0])
