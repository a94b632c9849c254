"""Adapters on the policy: only they learn, the reference costs nothing, and they load where peft's do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from asyppo.algorithm.options import PolicyLossOptions
from asyppo.algorithm.policy_losses import PolicyTargets
from asyppo.checkpoint import load_checkpoint, publish_checkpoint, take_checkpoint
from asyppo.config import AsyPPOConfig, ConfigError, PolicyConfig
from asyppo.data.batch import Batch, micro_batches
from asyppo.models.adapters import add_lora, has_adapters
from asyppo.models.critics import StackedCritics
from asyppo.models.policy import Objective, Policy, WithoutAdapters
from asyppo.rollout.samplers import GenerateSampler

Make = Callable[..., Any]
CPU = torch.device("cpu")
LORA: dict[str, Any] = {"r": 4, "alpha": 8, "target_modules": None}


def likes_a(completions: list[str], **_: Any) -> list[float]:
    """Share of a's."""
    return [c.count("a") / max(len(c), 1) for c in completions]


def logprobs(policy: Any, batch: Batch) -> torch.Tensor:
    """Of the whole batch."""
    return policy.logprobs(batch, micro_batches(batch, torch.arange(len(batch)), 1000))[0]


@pytest.fixture
def base(tiny_lm: Make, tmp_path: Path) -> str:
    """A model in a directory."""
    tiny_lm().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def adapted(base: str) -> Callable[..., Policy]:
    """Load ``base`` with new adapters; ``scramble`` makes them matter."""

    def make(scramble: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> Policy:
        policy = Policy.from_pretrained(base, temperature=1.0, dtype=dtype, device=CPU, lora=LORA | changes)
        for name, parameter in policy.named_parameters():
            if scramble and "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return policy

    return make


def test_a_new_adapter_changes_nothing_and_is_all_that_trains(
    adapted: Make, base: str, ragged_batch: Make, tiny_config: Make, tiny_trainer: Make
) -> None:
    batch, policy = ragged_batch(), adapted()
    plain = Policy.from_pretrained(base, temperature=1.0, dtype=torch.float32, device=CPU)
    assert torch.equal(logprobs(policy, batch), logprobs(plain, batch))
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 2 * 7  # A and B in two layers of seven projections
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    config = tiny_config()
    row = tiny_trainer(config, likes_a, policy=policy).step(1).metrics
    moved = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in trained if "lora_B" in name}  # A's gradient is 0 as long as B is
    assert row["actor/grad_norm"] > 0


def test_gradients_are_those_of_full_logits(adapted: Make, ragged_batch: Make) -> None:
    batch, policy = ragged_batch(), adapted(scramble=True)
    other = copy.deepcopy(policy.model)
    old, weight = logprobs(policy, batch), torch.rand_like(batch.reward)
    for micro in micro_batches(batch, torch.arange(len(batch)), 30):
        targets = PolicyTargets(old, torch.ones_like(old), weight, batch.mask, batch.mask).at(micro.grid)
        policy(micro, Objective(targets, PolicyLossOptions())).loss.backward()
    loss = torch.zeros(())
    for b in range(len(batch)):
        start, end = int(batch.prompt_length[b]), int(batch.length[b])
        log_p = other(batch.tokens[b : b + 1, :end]).logits[0, start - 1 : end - 1].log_softmax(-1)
        loss -= (weight[b, : end - start] * log_p.gather(1, batch.tokens[b, start:end, None])[:, 0]).sum()
    loss.backward()
    for (name, one), (_, two) in zip(policy.model.named_parameters(), other.named_parameters(), strict=True):
        assert (one.grad is None) == ("lora_" not in name)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, atol=2e-5, rtol=2e-4)


def test_the_reference_is_the_model_under_the_adapters(
    adapted: Make, base: str, ragged_batch: Make, tiny_config: Make, tiny_trainer: Make
) -> None:
    batch, policy = ragged_batch(), adapted(scramble=True)
    plain = Policy.from_pretrained(base, temperature=1.0, dtype=torch.float32, device=CPU)
    own = logprobs(policy, batch)
    reference = policy.reference()
    assert isinstance(reference, WithoutAdapters)
    assert torch.equal(logprobs(reference, batch), logprobs(plain, batch))
    assert torch.equal(logprobs(policy, batch), own)  # they are back
    assert not torch.allclose(own, logprobs(plain, batch), atol=1e-2)
    config = tiny_config(beta=0.1)
    trainer = tiny_trainer(config, likes_a, policy=adapted())
    rows = [trainer.step(step).metrics for step in (1, 2)]
    assert rows[0]["actor/kl_loss"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["actor/kl_loss"] > 1e-6
    assert trainer.reference.policy is trainer.policy


def test_the_adapters_come_back_after_an_error(adapted: Make, ragged_batch: Make) -> None:
    policy, batch = adapted(scramble=True), ragged_batch()
    own, reference = logprobs(policy, batch), policy.reference()

    def broken() -> Any:
        raise RuntimeError("no micro-batches")
        yield

    with pytest.raises(RuntimeError):
        reference.logprobs(batch, broken())
    assert torch.equal(logprobs(policy, batch), own)


def test_checkpoints_hold_the_adapters(
    adapted: Make, ragged_batch: Make, tokenizer: Any, tiny_config: Make, tiny_trainer: Make, tmp_path: Path
) -> None:
    config, batch = tiny_config(), ragged_batch()
    trainer = tiny_trainer(config, likes_a, policy=adapted())
    for step in (1, 2):
        trainer.step(step)
    own = logprobs(trainer.policy, batch)
    state = trainer.trained()
    path = publish_checkpoint(
        take_checkpoint(tmp_path, 2, trainer.policy, trainer.critics, tokenizer, state, {}, copied=True)(), None
    )
    assert {file.name for file in (path / "policy").glob("*.safetensors")} == {"adapter_model.safetensors"}
    saved = FileSystemReader(path / "state").read_metadata().state_dict_metadata
    of_policy = {name.removeprefix("policy.model.") for name in saved if name.startswith("policy.model.")}
    assert of_policy == {name for name, p in trainer.policy.model.named_parameters() if p.requires_grad}
    for auto_class in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(path / "policy").eval()
        with torch.no_grad():
            logits = loaded(batch.tokens[:1, : int(batch.length[0])]).logits[0]
        start, end = int(batch.prompt_length[0]), int(batch.length[0])
        expected = logits[start - 1 : end - 1].log_softmax(-1).gather(1, batch.tokens[0, start:end, None])[:, 0]
        torch.testing.assert_close(own[0, : end - start], expected, atol=1e-5, rtol=0)
    # As a policy, to evaluate it or to go on training it.
    again = Policy.from_pretrained(str(path / "policy"), temperature=1.0, dtype=torch.float32, device=CPU)
    assert torch.equal(logprobs(again, batch), own)
    assert {n for n, p in again.model.named_parameters() if p.requires_grad} == {
        n for n, p in trainer.policy.model.named_parameters() if p.requires_grad
    }
    # And with the optimizer, in a new trainer of the same start.
    other = tiny_trainer(config, likes_a, policy=adapted())
    load_checkpoint(path, other.trained())
    assert torch.equal(logprobs(other.policy, batch), own)
    moments = [[v["exp_avg"] for v in t.policy_optimizer.state.values()] for t in (trainer, other)]
    assert len(moments[0]) == 28
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_the_sampler_sees_the_adapters(adapted: Make, ragged_batch: Make) -> None:
    policy = adapted(scramble=True)
    sampler = GenerateSampler(policy.model, eos_token_ids=[1], pad_token_id=0)
    [response] = sampler.sample([torch.tensor([3, 4])], max_completion_length=5, temperature=1.0)
    with torch.no_grad():
        logits = policy.model(torch.cat([torch.tensor([3, 4]), response.tokens])[None]).logits[0, 1:-1]
    expected = logits.log_softmax(-1).gather(1, response.tokens[:, None])[:, 0]
    torch.testing.assert_close(response.logprob, expected, atol=1e-5, rtol=0)


def test_what_is_frozen_is_in_the_compute_dtype(adapted: Make, ragged_batch: Make) -> None:
    policy = adapted(dtype=torch.bfloat16)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    difference = (logprobs(policy, ragged_batch()) - logprobs(adapted(), ragged_batch())).abs().max()
    assert 1e-4 < difference < 0.5


def test_some_layers_only(adapted: Make) -> None:
    policy = adapted(target_modules=["q_proj", "v_proj"])
    names = {name.split(".")[-4] for name, p in policy.model.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lm_head"], r"policy\.lora_target_modules: got \['lm_head'\], which names the head"),
        (["q_proj", "no_such"], None),
        (["no_such"], r"policy\.lora_target_modules: .*no_such"),
    ],
)
def test_layers_that_cannot_have_adapters(tiny_lm: Make, names: list[str], message: str | None) -> None:
    if message is None:
        add_lora(tiny_lm(), r=2, alpha=2, target_modules=names)  # peft's rule: one that is there is enough
        return
    with pytest.raises(ConfigError, match=message):
        add_lora(tiny_lm(), r=2, alpha=2, target_modules=names)


def test_a_peft_that_transformers_does_not_take(tiny_lm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(*_: Any, **__: Any) -> None:
        raise ValueError("The version of PEFT you are using is not compatible, please use a version >= 0.22.0")

    model = tiny_lm()
    monkeypatch.setattr(model, "add_adapter", too_old)
    with pytest.raises(ConfigError, match=r"policy\.use_peft: transformers .* with peft .* please use a version >="):
        add_lora(model, r=2, alpha=2, target_modules=None)


def test_a_critic_needs_a_model(adapted: Make, tmp_path: Path) -> None:
    adapted().model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="holds an adapter, a critic needs a model"):
        StackedCritics.from_pretrained(str(tmp_path / "adapter"), 1, vocab_size=19, dtype=torch.float32, device=CPU)


def test_a_rank_of_zero() -> None:
    with pytest.raises(ConfigError, match=r"policy\.lora_r: got 0, needs an integer of at least 1"):
        AsyPPOConfig(policy=PolicyConfig(lora_r=0)).validate()


def test_a_plain_model_has_no_adapters(tiny_lm: Make, adapted: Make) -> None:
    assert not has_adapters(tiny_lm())
    assert has_adapters(adapted().model)
