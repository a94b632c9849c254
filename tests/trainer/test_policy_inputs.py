"""Critics that read the policy's log-probs and entropies: against plain models given their sum with the embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, Qwen3ForTokenClassification

from asyppo.algorithm.schedules import set_learning_rate
from asyppo.config import AsyPPOConfig, ConfigError, CriticConfig
from asyppo.data.batch import Batch, micro_batch
from asyppo.models.critics import (
    CriticOptimizer,
    Critics,
    LoraCritics,
    OneByOneCritics,
    StackedCritics,
    load_critics,
    policy_inputs,
)
from asyppo.models.critics import stacked as stacked_critics
from asyppo.models.critics.inputs import read_also
from asyppo.models.critics.loading import value_head

NAMES = ("logprob", "entropy")
KINDS: dict[str, dict[str, Any]] = {"stacked": {}, "one by one": {"stacked": False}, "adapters": {"lora_r": 3}}
kinds = pytest.mark.parametrize("kind", KINDS)
Make = Callable[..., Any]


@pytest.fixture
def batch(ragged_batch: Make) -> Batch:
    """Ragged responses, and what a policy says of them."""
    made = ragged_batch()
    stats = SimpleNamespace(logprob=-torch.rand(made.reward.shape) * made.mask, entropy=torch.rand(made.reward.shape))
    made.policy_inputs = policy_inputs(stats, made.mask, NAMES)
    return made


def load(path: Any, num_critics: int = 2, names: Any = NAMES, **fields: Any) -> Critics:
    """Float32 critics on the CPU whose adapters and projections, zero at first, do something."""
    config = CriticConfig(policy_inputs=list(names), **fields)
    critics = load_critics(path, num_critics, config, dtype=torch.float32, device=torch.device("cpu"))
    torch.manual_seed(1)
    for part in ("lora_B", "project.", "policy_inputs."):
        for name, p in critics.named_parameters():
            if part in name:
                torch.nn.init.normal_(p, std=0.5)
    return critics


def beside(batch: Batch, b: int) -> Tensor:
    """What is read beside each token of row ``b``, [tokens, F], from the definition."""
    start, count = int(batch.prompt_length[b]), int(batch.response_length[b])
    read = torch.zeros(start + count, len(NAMES))
    for t in range(count):
        read[start - 1 + t] = batch.policy_inputs[b, t]
    return read


def plainly(critics: Critics, m: int, batch: Batch, b: int) -> Tensor:
    """The values of critic ``m`` of the tokens of row ``b``, by transformers, from embeddings."""
    model, start, end = critics.models[m], int(batch.prompt_length[b]), int(batch.length[b])
    ids = batch.tokens[b : b + 1, :end]
    embeds = model.get_input_embeddings()(ids) + beside(batch, b) @ model.policy_inputs.weight
    hidden = model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return value_head(model)(hidden)[0, start - 1 : end - 1, 0]


def test_what_is_read_where() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    stats = SimpleNamespace(logprob=torch.tensor([[-1.0, -2, -3], [-4, 0, 0]]), entropy=torch.arange(6.0).view(2, 3))
    read = policy_inputs(stats, mask, NAMES)
    assert read[..., 0].tolist() == [[0, -1, -2], [0, 0, 0]]
    assert torch.equal(read[..., 1], stats.entropy)
    assert torch.equal(policy_inputs(stats, mask, ["entropy"])[..., 0], stats.entropy)


@pytest.mark.parametrize("packed", [False, True])
def test_it_lies_where_the_token_is_predicted(packed: bool, batch: Batch) -> None:
    rows = [3, 0, 7]
    micro = micro_batch(batch, rows, packed=packed)
    read = micro.at_predicting(batch.policy_inputs)
    assert read.shape == (*micro.input_ids.shape, 2)
    for i, row in enumerate(rows):
        own = read[0, micro.packing.starts[i] :] if packed else read[i]
        assert torch.equal(own[: int(batch.length[row])], beside(batch, row))


@pytest.mark.parametrize("num_critics", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [StackedCritics, OneByOneCritics])
def test_values_and_gradients_are_those_of_plain_models(
    kind: Any, num_critics: int, tiny_critic: Make, batch: Batch
) -> None:
    models = [tiny_critic(seed=m) for m in range(num_critics)]
    for model in models:
        read_also(model, NAMES)
        torch.nn.init.normal_(model.policy_inputs.weight)
    critics, plain = kind(copy.deepcopy(models)), kind(models)
    want = torch.zeros(num_critics, *batch.reward.shape)
    shares = [torch.arange(m, len(batch), num_critics) for m in range(num_critics)]
    upstream = torch.randn(want.shape)
    for m in range(num_critics):
        for b in range(len(batch)):
            value = plainly(plain, m, batch, b)
            want[m, b, : len(value)] = value.detach()
            if b in shares[m]:
                (value * upstream[m, b, : len(value)]).sum().backward()
    for budget in (40, 10_000):
        torch.testing.assert_close(critics.values(batch, budget), want, atol=1e-5, rtol=1e-5)
        critics.backward(batch, shares, lambda m, micro, value: (value * upstream[m][micro.grid]).sum(), budget)
        critics.collect_gradients()
        for own, other in zip(critics.models, models, strict=True):
            assert set(dict(own.named_parameters())) >= {"policy_inputs.weight"}
            for (name, p), (_, q) in zip(own.named_parameters(), other.named_parameters(), strict=True):
                assert float((p.grad - q.grad).norm()) <= 1e-5 * float(q.grad.norm()), name
        critics.release_gradients()


def test_adapters_are_those_of_plain_models(tiny_critic: Make, batch: Batch, tmp_path: Path) -> None:
    """The adapters' products are added to the weights of a plain model."""
    tiny_critic().save_pretrained(tmp_path)
    critics = load(str(tmp_path), lora_r=3)
    assert isinstance(critics, LoraCritics)
    value = critics.values(batch, 10_000)
    everything = [torch.arange(len(batch))] * 2
    critics.backward(batch, everything, lambda m, micro, value: value.sum(), 10_000)
    for m in range(2):
        model = Qwen3ForTokenClassification.from_pretrained(tmp_path, num_labels=1).eval()
        parts = dict(critics.named_parameters())
        for name, p in critics.named_parameters():
            if name.endswith("lora_A"):
                stem = name.removesuffix(".lora_A")
                low = parts[f"{stem}.lora_B"][m] @ p[m] * critics.alpha / critics.r
                model.base_model.get_parameter(f"{stem}.weight").data += low.detach()
        model.score.load_state_dict(
            {k: parts[f"score.{k}"][m].reshape(v.shape) for k, v in model.score.state_dict().items()}
        )
        read_also(model, NAMES)
        model.policy_inputs.weight.data = critics.project.weight[m].detach()
        plain = SimpleNamespace(models=[model])
        for b in range(len(batch)):
            own = plainly(plain, 0, batch, b)  # type: ignore[arg-type]
            own.sum().backward()
            torch.testing.assert_close(value[m, b, : len(own)], own.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            critics.project.weight.grad[m], model.policy_inputs.weight.grad, atol=1e-4, rtol=1e-4
        )
    assert critics.embed_tokens.weight.grad is None


@kinds
def test_a_projection_of_zeros_changes_no_bit(
    kind: str, tiny_critic: Make, batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        stacked_critics, "WORTH_SHARING", 1
    )  # without inputs prompts may be shared, and sums in another order
    tiny_critic().save_pretrained(tmp_path)
    values, gradients = [], []
    shares = [torch.arange(0, 12, 2), torch.arange(1, 12, 2)]
    for names in ((), NAMES):
        torch.manual_seed(2)
        critics = load(str(tmp_path), names=names, **KINDS[kind])
        with torch.no_grad():
            for name, p in critics.named_parameters():
                if "project." in name or "policy_inputs" in name:
                    p.zero_()
        values.append(critics.values(batch, 10_000))
        critics.backward(batch, shares, lambda m, micro, value: value.square().sum(), 10_000)
        gradients.append({name: p.grad for name, p in critics.named_parameters() if p.grad is not None})
    assert torch.equal(*values)
    extra = set(gradients[1]) - set(gradients[0])
    assert {name.replace("models.0", "models.1") for name in extra} == {
        "models.1.policy_inputs.weight" if kind == "one by one" else "project.weight"
    }
    assert all(float(gradients[1][name].abs().max()) > 0 for name in extra)
    assert all(torch.equal(gradients[1][name], g) for name, g in gradients[0].items())


@kinds
def test_the_projection_has_a_rate_of_its_own(kind: str, tiny_critic: Make, batch: Batch, tmp_path: Path) -> None:
    """Adam's first step is the learning rate, whatever the gradient; the decay is the same for all."""
    tiny_critic().save_pretrained(tmp_path)
    critics = load(str(tmp_path), **KINDS[kind])
    rate, ratio, decay = 1e-3, 30.0, 0.1
    optimizer = CriticOptimizer(critics, learning_rate=rate, weight_decay=decay, policy_inputs_lr_ratio=ratio)
    set_learning_rate(optimizer.adamw, rate / 2)
    before = {name: p.detach().clone() for name, p in critics.named_parameters()}
    everything = [torch.arange(len(batch))] * 2
    losses = critics.backward(batch, everything, lambda m, micro, value: value.square().sum(), 10_000)
    optimizer.step(losses, 1.0, active=[True, True])
    for name, p in critics.named_parameters():
        own = ratio if "project." in name or "policy_inputs." in name else 1.0
        moved = (p.detach() - before[name] * (1 - decay * rate / 2)).abs().max()
        if p.requires_grad:
            assert float(moved) == pytest.approx(own * rate / 2, rel=1e-2), name


@pytest.mark.parametrize("family", ["opt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "mamba"))])
def test_any_family(family: str, batch: Batch, tmp_path: Path) -> None:
    """One by one, through the embedding: of positions of its own, narrower than the layers, of no attention."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    own = {"gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2}, "opt": {"word_embed_proj_dim": 8, "ffn_dim": 32}}
    config = AutoConfig.for_model(family, **shape | own.get(family, {}), vocab_size=19)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    critics = load(str(tmp_path))
    value = critics.values(batch, 10_000)
    with torch.no_grad():
        for m in range(2):
            for b in range(len(batch)):
                own_value = plainly(critics, m, batch, b)
                torch.testing.assert_close(value[m, b, : len(own_value)], own_value, atol=1e-5, rtol=1e-5)
    critics.save_pretrained(tmp_path)
    config_of_critics = CriticConfig(policy_inputs=list(NAMES))
    again = load_critics(
        str(tmp_path / "critic_1"), 1, config_of_critics, dtype=torch.float32, device=torch.device("cpu")
    )
    torch.testing.assert_close(again.values(batch, 10_000)[0], value[1], atol=1e-6, rtol=1e-6)


@kinds
def test_save_and_load(kind: str, tiny_critic: Make, batch: Batch, tmp_path: Path) -> None:
    """They go on from where they were; transformers loads the rest; and nobody reads what it was not trained to."""
    tiny_critic().save_pretrained(tmp_path)
    critics = load(str(tmp_path), **KINDS[kind])
    value = critics.values(batch, 10_000)
    critics.save_pretrained(tmp_path)
    paths = [tmp_path / f"critic_{m}" for m in range(2)]
    adapters = partial(LoraCritics.from_pretrained, paths, 2, r=3, alpha=16.0)
    if kind == "adapters":
        again: Critics = adapters()
    else:
        again = type(critics).from_pretrained(paths, 2)  # type: ignore[attr-defined]
        _, report = AutoModelForTokenClassification.from_pretrained(paths[0], output_loading_info=True)
        assert not report["unexpected_keys"]
    assert again.policy_inputs == NAMES
    assert torch.equal(again.values(batch, 10_000), value)
    for names in ((), ("entropy",)):
        one = partial(load, str(paths[0]), names=names, **KINDS[kind])
        again_as = partial(adapters, policy_inputs=names) if kind == "adapters" else one
        with pytest.raises(ConfigError, match=r"critic\.policy_inputs: got .*, needs \['logprob', 'entropy'\], which "):
            again_as()


def test_what_does_not_fit(tiny_config: Make, tiny_trainer: Make, tiny_critic: Make, ragged_batch: Make) -> None:
    critics = StackedCritics([tiny_critic(seed=m) for m in range(2)])
    ids, read = torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, 4, 2)
    with pytest.raises(ValueError, match=r"inputs: got shape \[3, 4, 2\], needs None of critics"):
        critics(ids, inputs=read)
    models = [tiny_critic(seed=m) for m in range(2)]
    read_also(models[0], NAMES)
    with pytest.raises(ConfigError, match=r"critic\.policy_inputs: got critics that read .*, needs the same of all"):
        OneByOneCritics(models)
    read_also(models[1], NAMES)
    critics = StackedCritics(models)
    with pytest.raises(ValueError, match=r"inputs: got None, needs \[3, 4, 2\] of critics"):
        critics(ids)
    with pytest.raises(ValueError, match=r"batch\.policy_inputs: got None, needs logprob, entropy, which critics"):
        critics.values(ragged_batch(), 10_000)
    for names in (["entropy", "entropy"], ["logits"], "entropy"):
        with pytest.raises(ConfigError, match=r"critic\.policy_inputs: got .*, needs a list of logprob, entropy, each"):
            tiny_config(critic={"policy_inputs": names}).validate()


@pytest.mark.parametrize("stacked", [True, False])
def test_a_step_gives_critics_the_old_pass(
    stacked: bool, tiny_config: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: AsyPPOConfig = tiny_config(critic={"policy_inputs": list(NAMES), "stacked": stacked})
    trainer = tiny_trainer(config, lambda completions, **_: [float(c.count("a")) for c in completions])
    seen: list[Batch] = []
    values = trainer.critics.values
    monkeypatch.setattr(trainer.critics, "values", lambda batch, limit: values(seen.append(batch) or batch, limit))
    before = trainer.policy.logprobs
    stats: list[Any] = []
    monkeypatch.setattr(trainer.policy, "logprobs", lambda *of: stats.append(before(*of)) or stats[-1])
    trainer.step(1)
    assert torch.equal(seen[0].policy_inputs, policy_inputs(stats[0], seen[0].mask, NAMES))
    moved = [model.policy_inputs.weight for model in trainer.critics.models]
    assert all(bool(weight.any()) for weight in moved)
