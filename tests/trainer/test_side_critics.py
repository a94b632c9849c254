"""Side critics: against each of them in plain torch, given the policy's hidden states as transformers has them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asyppo.config import AsyPPOConfig, ConfigError, SideConfig
from asyppo.data.batch import Batch, micro_batches
from asyppo.models.critics import SideCritics, policy_inputs
from asyppo.models.critics.side import SideCritic
from asyppo.models.loading import critics_of
from asyppo.models.policy import Policy

NAMES = ["logprob", "entropy"]
Make = Callable[..., Any]
networks = pytest.mark.parametrize("network", ["transformer", "mlp"])


def side(network: str = "transformer", **changes: Any) -> dict[str, Any]:
    """A critic's settings."""
    own = {"layers": [-1], **changes.pop("side", {})}
    return {"kind": "side", "side": {"network": network, "width": 32} | own, "policy_inputs": NAMES} | changes


@pytest.fixture
def config_of(tiny_config: Make) -> Make:
    """Make a configuration with side critics."""

    def make(critic: dict[str, Any] | None = None, **fields: Any) -> AsyPPOConfig:
        critic = side() if critic is None else critic
        return tiny_config(critic=critic | {"side": SideConfig(**critic["side"])}, **fields)

    return make


@pytest.fixture
def policy(tiny_lm: Make) -> Policy:
    return Policy(tiny_lm())


def of_policy(policy: Policy, config: AsyPPOConfig, path: Any = None) -> SideCritics:
    """Side critics whose projections of policy inputs, zero at first, do something."""
    critics = critics_of(path, config, policy)
    assert isinstance(critics, SideCritics)
    if path is None and critics.policy_inputs:
        torch.nn.init.normal_(critics.project.weight, std=0.5)
    return critics


def observed(policy: Policy, critics: SideCritics, batch: Batch, max_bytes: int = 10**9, budget: int = 50) -> Batch:
    """``batch`` as a step shows it to critics."""
    hidden = policy.states_of(batch, critics.read_layers, critics.states_size, max_bytes)
    old = policy.logprobs(batch, micro_batches(batch, torch.arange(len(batch)), budget), hidden)
    read = policy_inputs(old, batch.mask, critics.policy_inputs) if critics.policy_inputs else None
    return replace(batch, hidden=hidden, policy_inputs=read)


def plainly(policy: Policy, model: SideCritic, batch: Batch, b: int) -> Tensor:
    """The values of one critic of the tokens of row ``b``, by transformers and the definition."""
    start, end = int(batch.prompt_length[b]), int(batch.length[b])
    with torch.no_grad():
        found = policy.model(batch.tokens[b : b + 1, :end], output_hidden_states=True)
        logprob, given = found.logits.log_softmax(-1)[0], batch.tokens[b, start:end]
    states = []
    for layer in model.shape.layers:
        x = found.hidden_states[layer][0, start - 1 : end - 1]
        states.append(x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    said = logprob[start - 1 : end - 1]
    before = torch.cat([torch.zeros(1), said.gather(1, given[:, None])[:-1, 0]])
    inputs = torch.stack([before, -(said.exp() * said).sum(-1)], dim=-1)[None]
    output = model(torch.cat(states, dim=-1)[None], inputs if model.shape.policy_inputs else None)[0]
    return output.sigmoid() if model.shape.loss == "bce" else output


@pytest.mark.parametrize(
    ("network", "num_critics", "layers", "changes"),
    [
        ("transformer", 2, [-1], {}),
        ("mlp", 3, [1, 2], {"policy_inputs": []}),
        ("transformer", 1, [-2], {"loss": "bce", "gradient_checkpointing": True}),
    ],
)
def test_values_and_gradients_are_those_of_plain_networks(
    network: str, num_critics: int, layers: list[int], changes: Any, config_of: Make, policy: Policy, ragged_batch: Make
) -> None:
    """Whether states are kept or made again, and however the batch is cut."""
    batch: Batch = ragged_batch()
    config = config_of(side(network, side={"layers": layers}, num_critics=num_critics, **changes))
    critics = of_policy(policy, config)
    plain = copy.deepcopy(critics.models)
    want = torch.zeros(num_critics, *batch.reward.shape)
    shares = [torch.arange(m, len(batch), num_critics) for m in range(num_critics)]
    shares[-1] = shares[-1][:-2]  # it runs out first
    upstream = torch.randn(want.shape)
    for m, model in enumerate(plain):
        for b in range(len(batch)):
            value = plainly(policy, model, batch, b)
            want[m, b, : len(value)] = value.detach()
            if b in shares[m]:
                (value * upstream[m, b, : len(value)]).sum().backward()

    def loss(m: int, micro: Any, output: Tensor) -> Tensor:
        return (critics.value_of(output) * upstream[m][micro.grid]).sum()

    for max_bytes in (10**9, 0):
        shown = observed(policy, critics, batch, max_bytes)
        assert shown.hidden is not None
        assert shown.hidden.are_kept == bool(max_bytes)
        for budget in (40, 10_000):
            torch.testing.assert_close(critics.values(shown, budget), want, atol=1e-5, rtol=1e-5)
            critics.backward(shown, shares, loss, budget)
            critics.collect_gradients()
            for own, other in zip(critics.models, plain, strict=True):
                for (name, p), (_, q) in zip(own.named_parameters(), other.named_parameters(), strict=True):
                    assert float((p.grad - q.grad).norm()) <= 1e-5 * float(q.grad.norm()) + 1e-6, name
            critics.release_gradients()
    assert all(p.grad is None for p in policy.parameters())
    own = critics.own_values(shown, shares, 10_000)
    torch.testing.assert_close(own[0, shares[0]], want[0, shares[0]], atol=1e-5, rtol=1e-5)


def test_a_packed_policy_or_one_that_shares_prompts_gives_the_same_states(
    config_of: Make, policy: Policy, ragged_batch: Make
) -> None:
    batch, critics = ragged_batch(), of_policy(policy, config_of(side(side={"layers": [1, -1]})))
    ways: list[dict[str, bool]] = [{}, {"packed": True}, {"shared": True}]
    states = [policy.states_of(batch, critics.read_layers, critics.states_size, 10**9) for _ in ways]
    everything = torch.arange(len(batch))
    for way, kept in zip(ways, states, strict=True):
        policy.logprobs(batch, micro_batches(batch, everything, 30, **way), kept)
    padded, *others = [kept.of([*micro_batches(batch, everything, 10_000)])[0] for kept in states]
    for other in others:
        torch.testing.assert_close(other, padded, atol=1e-5, rtol=1e-5)


@networks
def test_a_zero_projection_reads_nothing(network: str, config_of: Make, policy: Policy, ragged_batch: Make) -> None:
    batch = ragged_batch()
    without = of_policy(policy, config_of(side(network, policy_inputs=[])))
    reading = critics_of(None, config_of(side(network)), policy)
    assert isinstance(reading, SideCritics)
    shown = observed(policy, reading, batch)
    assert torch.equal(reading.values(shown, 100), without.values(shown, 100))


def test_save_and_load(config_of: Make, policy: Policy, ragged_batch: Make, tmp_path: Path) -> None:
    config = config_of(side(loss="bce"))
    critics = of_policy(policy, config)
    shown = observed(policy, critics, ragged_batch())
    value = critics.values(shown, 100)
    assert bool((value[0] != value[1])[:, 0].all())  # each has weights of its own
    critics.save_pretrained(tmp_path)
    paths = [str(tmp_path / f"critic_{m}") for m in (1, 0)]
    assert torch.equal(of_policy(policy, config, paths).values(shown, 100), value.flip(0))
    assert torch.equal(of_policy(policy, config, paths[0]).values(shown, 100), value[1:].expand(2, -1, -1))
    for changes, message in (
        ({"loss": "mse"}, r"critic\.loss: got 'mse', needs 'bce', by which the critic .* was trained"),
        ({"policy_inputs": ["entropy"]}, r"critic\.policy_inputs: got \['entropy'\], needs \['logprob', 'entropy'\]"),
        ({"side": {"width": 64}}, r"critic\.side\.width: got 64, needs 32, as the critic .* has it"),
        ({"side": {"layers": [1]}}, r"critic\.side\.layers: got \[1\], needs \[2\], as the critic"),
    ):
        with pytest.raises(ConfigError, match=message):
            of_policy(policy, config_of(side(**{"loss": "bce"} | changes)), paths)
    with pytest.raises(ConfigError, match=r"has no side_critic\.json, needs a side critic of an earlier run, or none"):
        of_policy(policy, config, str(tmp_path))
    with pytest.raises(ConfigError, match=r"critic\.kind: got 'mini', needs 'side' for '.*critic_1', which is a side"):
        of_policy(policy, config_of(side() | {"kind": "mini"}), paths)
    shape, weights = (Path(paths[0]) / name for name in ("side_critic.json", "side_critic.safetensors"))
    for damage, message in (
        (lambda: os.truncate(weights, 100), r"cannot load '.*critic_1': .*header"),
        (weights.unlink, r"cannot load '.*critic_1': No such file"),
        (
            lambda: shape.write_text('{"loss": "bce"}'),
            r"side_critic\.json of .* is not that of a side critic: KeyError: ",
        ),
        (lambda: shape.write_text("{"), r"side_critic\.json of .* is not that of a side critic: JSONDecodeError: "),
    ):
        damage()
        with pytest.raises(ConfigError, match=rf"^critic\.model_name_or_path: {message}"):
            of_policy(policy, config, paths)


def test_what_does_not_fit(config_of: Make, policy: Policy, tiny_trainer: Make, ragged_batch: Make) -> None:
    for layers in ([0], [3], [-3]):
        with pytest.raises(
            ConfigError, match=rf"critic\.side\.layers: got \[{layers[0]}\], needs layers of the policy"
        ):
            of_policy(policy, config_of(side(side={"layers": layers})))
    for fields, message in (
        ({"critic": side(side={"width": 48})}, r"critic\.side\.width: got 48, needs a multiple of 32"),
        ({"critic": side(side={"layers": []})}, r"critic\.side\.layers: got \[\], needs a list"),
        ({"critic": side(lora_r=2)}, r"critic\.lora_r: got 2, needs 0 with critic\.kind 'side'"),
        ({"critic": side(stacked=False)}, r"critic\.stacked: got False, needs True with critic\.kind 'side'"),
        ({"algorithm": "ppo"}, r"critic\.kind: got 'side', needs 'mini' for algorithm ppo"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of(**fields).validate()
    with pytest.raises(ConfigError, match=r"critic\.kind: got 'side', needs what the given critics are, StackedC"):
        tiny_trainer(config_of(), likes_a, critics="mini")
    critics = of_policy(policy, config_of())
    with pytest.raises(ValueError, match=r"batch\.hidden: got None, needs the policy's hidden states"):
        critics.values(ragged_batch(), 100)
    hidden = policy.states_of(batch := ragged_batch(), critics.read_layers, critics.states_size, 10**9)
    with pytest.raises(RuntimeError, match="hidden states are read before the pass that keeps them has ended"):
        critics.values(replace(batch, hidden=hidden, policy_inputs=torch.zeros(*batch.reward.shape, 2)), 100)


def likes_a(completions: list[str], **_: Any) -> list[float]:
    return [float("a" in c) for c in completions]


@pytest.mark.parametrize("network", ["transformer", pytest.param("mlp", marks=pytest.mark.slow)])
def test_a_step_shows_critics_the_old_pass(
    network: str, config_of: Make, tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They learn from it; the policy's update does not have its states, whether they are kept or made again."""
    found: list[dict[str, float]] = []
    for keep_bytes in (10**9, 0):
        critic = side(network, side={"keep_bytes": keep_bytes}, num_iterations=2, learning_rate=1e-2)
        trainer = tiny_trainer(config_of(critic), likes_a)
        seen: list[Batch] = []
        values, update = trainer.critics.values, trainer.update_policy
        monkeypatch.setattr(trainer.critics, "values", lambda b, n, v=values, s=seen: v(s.append(b) or b, n))
        monkeypatch.setattr(trainer, "update_policy", lambda b, *a, u=update, s=seen: u(s.append(b) or b, *a))
        found.append([trainer.step(step).metrics for step in (1, 2, 3)][-1])
        assert all((batch.hidden is None) == bool(i % 2) for i, batch in enumerate(seen))
    assert found[0]["critic/vf_loss"] == pytest.approx(found[1]["critic/vf_loss"], rel=1e-4)
    assert all(row["critic/std/mean"] > 0 and row["critic/skipped_updates"] == 0 for row in found)
