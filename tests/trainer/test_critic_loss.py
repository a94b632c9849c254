"""Critics whose values are probabilities, and critics that start where those of an earlier run were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asyppo.cli.main import parse
from asyppo.config import ConfigError, CriticConfig
from asyppo.data.batch import Batch
from asyppo.models.critics import Critics, load_critics
from asyppo.models.critics.loading import CRITIC
from asyppo.models.loading import critics_of, given_critics
from asyppo.models.policy import Policy

KINDS: dict[str, dict[str, Any]] = {"stacked": {}, "one by one": {"stacked": False}, "adapters": {"lora_r": 3}}
kinds = pytest.mark.parametrize("kind", KINDS)
Make = Callable[..., Any]


def load(path: Any, num_critics: int = 2, **fields: Any) -> Critics:
    """Float32 critics on the CPU; new heads are drawn alike."""
    torch.manual_seed(1)
    config = CriticConfig(**fields)
    return load_critics(path, num_critics, config, dtype=torch.float32, device=torch.device("cpu"))


@kinds
def test_values_are_probabilities_before_mean_and_deviation(
    kind: str, tiny_lm: Make, ragged_batch: Make, tmp_path: Path
) -> None:
    tiny_lm().save_pretrained(tmp_path)
    batch: Batch = ragged_batch()
    shares = [torch.arange(0, 12, 2), torch.arange(1, 12, 2)]
    plain, critics = (load(str(tmp_path), loss=loss, **KINDS[kind]) for loss in ("mse", "bce"))
    outputs, values = plain.values(batch, 10_000), critics.values(batch, 10_000)
    for value, output in zip(values, outputs, strict=True):
        torch.testing.assert_close(value[batch.mask], output[batch.mask].sigmoid())
        assert not value[~batch.mask].any()
    own = critics.own_values(batch, shares, 10_000)
    for m, rows in enumerate(shares):
        torch.testing.assert_close(own[m, rows], values[m, rows])
    found: list[Tensor] = []

    def keep(m: int, micro: Any, output: Tensor) -> Tensor:
        found.append(output.detach() - outputs[m][micro.grid])
        return output.sum()

    critics.backward(batch, shares, keep, 10_000)
    assert max(float(gap.abs().max()) for gap in found) < 1e-5
    # A head of logits is none of values.
    critics.save_pretrained(tmp_path)
    paths = [str(tmp_path / f"critic_{m}") for m in range(2)]
    torch.testing.assert_close(load(paths, loss="bce", **KINDS[kind]).values(batch, 10_000), values)
    with pytest.raises(ConfigError, match=r"critic\.loss: got 'mse', needs 'bce', by which the critic .* was trained"):
        load(paths, **KINDS[kind])
    plain.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"critic\.loss: got 'bce', needs 'mse'"):
        load(paths, loss="bce", **KINDS[kind])
    assert (tmp_path / "critic_1" / CRITIC).read_text() == '{"loss": "mse"}\n'


@pytest.mark.parametrize("stacked", [True, False])
def test_training_by_cross_entropy(stacked: bool, tiny_config: Make, tiny_trainer: Make) -> None:
    """The first loss is that of the values before; and a return that is no probability is refused by name."""

    def likes_a(completions: list[str], **_: Any) -> list[float]:
        return [float("a" in c) for c in completions]

    config = tiny_config(critic={"loss": "bce", "stacked": stacked, "value_lambda": 0.9})
    trainer = tiny_trainer(config, likes_a)
    rows = [trainer.step(step).metrics for step in (1, 2, 3)]
    assert all(0 < row["critic/vf_loss"] < 2 and row["critic/skipped_updates"] == 0 for row in rows)
    assert all(row["critic/std/mean"] < 0.5 for row in rows)
    with pytest.raises(ConfigError, match=r"critic\.loss: got 'bce' and a return of 2 from the reward twice, less"):
        tiny_trainer(config, twice).step(1)
    with pytest.raises(ConfigError, match=r"critic\.cliprange_value: got 0\.2, needs none with critic\.loss 'bce'"):
        tiny_config(critic={"loss": "bce", "cliprange_value": 0.2}).validate()


def twice(completions: list[str], **_: Any) -> list[float]:
    """No probability."""
    return [2.0 for _ in completions]


@kinds
def test_a_path_each(
    kind: str, tiny_lm: Make, tiny_critic: Make, tiny_config: Make, ragged_batch: Make, tmp_path: Path
) -> None:
    """M critics of an earlier run, in their order, or one of them for all."""
    tiny_critic().save_pretrained(tmp_path)
    batch, fields = ragged_batch(), KINDS[kind]
    first = load(str(tmp_path), **fields)
    with torch.no_grad():
        for m, model in enumerate(first.models):
            for p in model.parameters():
                p.add_(0.1 * (m + 1) * torch.randn_like(p))
    first.save_pretrained(tmp_path)
    value = first.values(batch, 10_000)
    config, policy = tiny_config(critic=fields), Policy(tiny_lm())

    def started(*paths: Path) -> Tensor:
        critics = critics_of(given_critics(list(paths), config), config, policy)
        assert critics is not None
        assert type(critics) is type(first)
        return critics.values(batch, 10_000)

    paths = [tmp_path / "critic_0", tmp_path / "critic_1"]
    torch.testing.assert_close(started(*paths), value)
    torch.testing.assert_close(started(*reversed(paths)), value.flip(0))
    torch.testing.assert_close(started(paths[1]), value[1:].expand(2, -1, -1))
    with pytest.raises(ConfigError, match="critics: got 3 checkpoints, needs 1 or 2"):
        started(*paths, tmp_path)


def test_paths_in_a_configuration() -> None:
    for given, want in (("[a, b]", ["a", "b"]), ("a", "a")):
        assert parse(["train", "--critic.model_name_or_path", given]).critic.model_name_or_path == want
