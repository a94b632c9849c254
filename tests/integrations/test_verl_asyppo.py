"""AsyPPO in verl 0.9.1, through verl's own functions: from the critics' model to the advantage and the value loss."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="verl is not installed")
import numpy as np
import verl_numbers
from omegaconf import OmegaConf
from tensordict import TensorDict
from transformers import AutoConfig, AutoModelForTokenClassification, Qwen3Config, Qwen3ForCausalLM
from verl import DataProto
from verl.trainer.ppo.v1 import trainer_base
from verl.utils import tensordict_utils
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead
from verl.workers.utils.padding import response_from_nested, response_to_nested

from asyppo_kernels.integrations import verl_asyppo, verl_critics

M, PROMPT = 2, verl_numbers.PROMPT


@pytest.fixture(autouse=True)
def on() -> Iterator[None]:
    verl_asyppo.enable()
    yield
    verl_asyppo.disable()


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = Qwen3Config(
        vocab_size=verl_numbers.VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "base")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: SimpleNamespace(save_pretrained=id))
    verl_critics.save_critics(str(tmp_path / "base"), M, tmp_path / "critics")
    return tmp_path / "critics"


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def sequences() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(input_ids, prompts, responses, response_mask), nested, of the batch of ``verl_numbers``, with each length."""
    data = verl_numbers.batch()
    lengths = [9, 4, 7, 1, 8, 9]
    ids = [row[: PROMPT + n] for row, n in zip(data["input_ids"], lengths, strict=True)]
    masks = [row[:n] for row, n in zip(data["response_mask"], lengths, strict=True)]
    return nested(ids), nested([x[:PROMPT] for x in ids]), nested([x[PROMPT:] for x in ids]), nested(masks)


def values_of(model: Any, input_ids: Tensor) -> Tensor:
    """What verl's engine makes of the model's output on packed tokens: nested [B, length, M]."""
    micro = tensordict_utils.get_tensordict({"input_ids": input_ids}, {"use_remove_padding": True})
    places = torch.cat([torch.arange(len(x)) for x in input_ids.unbind()])[None]
    output = model(input_ids=input_ids.values()[None], position_ids=places)
    engine = SimpleNamespace(module=model, _gather_and_unpad_packed=lambda x, pad: x)
    return FSDPEngineWithValueHead.prepare_model_outputs(engine, output, {"pad_size": 0}, micro, None)["values"]


def advantage_data(values: Tensor, mask: Tensor) -> DataProto:
    """The batch that verl's trainer hands to its advantage, of nested values."""
    rewards = verl_numbers.batch()["token_level_rewards"]
    data = TensorDict({"values": values, "response_mask": mask}, batch_size=6).to_padded_tensor()
    data["token_level_rewards"] = rewards
    return DataProto(batch=data, non_tensor_batch={"uid": np.array(["a", "a", "b", "b", "c", "c"], dtype=object)})


def step(saved: Path) -> tuple[Any, DataProto, Tensor, Tensor]:
    """(model, the batch with advantages, values nested over the responses, mask nested)."""
    model = AutoModelForTokenClassification.from_pretrained(saved)
    input_ids, _, _, mask = sequences()
    values = response_from_nested(values_of(model, input_ids).detach(), mask)
    data = trainer_base.compute_advantage_for_multi_trajectories(
        advantage_data(values, mask), batch_keys=[], adv_estimator="gae", gamma=0.99, lam=0.9, num_repeat=2,
        norm_adv_by_std_in_grpo=True, config=OmegaConf.create({}),
    )  # fmt: skip
    return model, data, values, mask


def test_the_model_is_its_critics(saved: Path) -> None:
    assert AutoConfig.from_pretrained(saved).num_critics == M
    model = AutoModelForTokenClassification.from_pretrained(saved)
    ids = torch.randint(verl_numbers.VOCABULARY, (2, 5))
    logits = model(input_ids=ids).logits
    assert logits.shape == (2, 5, M)
    for m, critic in enumerate(model.critics):
        torch.testing.assert_close(logits[..., m], critic(input_ids=ids).logits[..., 0])
    one, other = (dict(critic.named_parameters()) for critic in model.critics)
    assert [name for name in one if not torch.equal(one[name], other[name])] == ["score.weight"]
    half = AutoModelForTokenClassification.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_advantage_is_of_the_mean_and_masked_where_critics_agree(saved: Path) -> None:
    _, data, values, nested_mask = step(saved)
    assert values.unbind()[0].shape == (9, M)
    mask = data.batch["response_mask"].bool()
    each = data.batch["values"]
    verl_asyppo.disable()
    plain = advantage_data(nested([x.mean(-1) for x in values.unbind()]), nested_mask)
    plain = trainer_base.compute_advantage_for_multi_trajectories(
        plain, batch_keys=[], adv_estimator="gae", gamma=0.99, lam=0.9, config=OmegaConf.create({})
    ).batch["advantages"]
    std = each.std(-1, correction=0)
    low = std[mask].sort().values[int(0.2 * mask.sum())]
    high = std[mask].sort(descending=True).values[int(0.2 * mask.sum())]
    torch.testing.assert_close(data.batch["advantages"][mask], (plain * (std >= low))[mask], atol=1e-5, rtol=1e-5)
    assert (data.batch["advantages"][mask] == 0).sum() == int(0.2 * mask.sum())
    assert torch.equal(data.batch["entropy_mask"].bool(), mask & (std <= high))


def test_a_response_teaches_its_own_critic(saved: Path) -> None:
    """The loss is M times verl's, and each critic's gradient that of verl's loss on its own responses."""
    model, data, values, mask = step(saved)
    returns = response_to_nested(data.batch["returns"], mask)
    owner = data.batch["returns"][:, 0].isnan().logical_not().int().argmax(-1)
    assert [sorted(owner[i : i + 2].tolist()) for i in (0, 2, 4)] == [[0, 1]] * 3
    input_ids, prompts, responses, _ = sequences()
    fields = {"prompts": prompts, "responses": responses, "values": values, "response_mask": mask}
    tokens = int(mask.values().sum())
    sizes = {"dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": None}
    config = SimpleNamespace(cliprange_value=0.5, loss_agg_mode="token-mean", loss_scale_factor=None)
    loss, metrics = trainer_base.value_loss(
        config,
        {"values": values_of(model, input_ids)},
        tensordict_utils.get_tensordict(fields | {"returns": returns}, sizes),
    )
    loss.backward()
    ours = [critic.score.weight.grad.clone() for critic in model.critics]
    assert metrics["critic/std/mean"] > 0

    verl_asyppo.disable()
    total = 0.0
    for m, critic in enumerate(model.critics):
        critic.zero_grad()
        own_mask = nested([x * (owner[i] == m) for i, x in enumerate(mask.unbind())])
        plain = {"values": nested([x[:, m] for x in values.unbind()]), "response_mask": own_mask}
        plain["returns"] = nested([x[:, m].nan_to_num() for x in returns.unbind()])
        one, _ = trainer_base.value_loss(
            config,
            {"values": nested([x[:, m] for x in values_of(model, input_ids).unbind()])},
            tensordict_utils.get_tensordict(fields | plain, sizes),
        )
        one.backward()
        total += M * one.item()
        torch.testing.assert_close(ours[m], M * critic.score.weight.grad)
        assert ours[m].abs().max() > 0
    assert loss.item() == pytest.approx(total)


def test_metrics_are_of_the_mean(saved: Path) -> None:
    _, data, _, _ = step(saved)
    tokens = verl_numbers.batch()["input_ids"]
    mask = data.batch["response_mask"]
    more = {"prompts": tokens[:, :PROMPT], "responses": tokens[:, PROMPT:], "token_level_scores": mask}
    more |= {"prompt_length": torch.full((6,), 3.0), "response_length": mask.sum(-1)}
    more["attention_mask"] = torch.cat([torch.ones(6, PROMPT), mask], dim=-1)
    for name, x in more.items():
        data.batch[name] = x
    found = trainer_base.compute_data_metrics(batch=data, use_critic=True)
    assert found["critic/values/mean"] == pytest.approx(data.batch["values"].mean(-1)[mask.bool()].mean().item())
    assert np.isfinite(found["critic/vf_explained_var"])
    assert data.batch["values"].dim() == 3


def test_values_of_one_critic_are_refused() -> None:
    _, _, _, mask = sequences()
    with pytest.raises(ValueError, match=r"values: got shape \[6, 9\], needs \[B, T, M\]"):
        trainer_base.compute_advantage_for_multi_trajectories(advantage_data(mask, mask), gamma=1.0, lam=1.0)


def test_a_module_of_ones_own_turns_it_on_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "my_asyppo.py").write_text(
        "from asyppo_kernels.integrations import verl_asyppo\n\nverl_asyppo.enable(advantage_fraction=0.1)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code = "import verl.trainer.ppo.v1.trainer_base as t; print(t.value_loss.__module__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VERL_USE_EXTERNAL_MODULES": "my_asyppo", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.stdout.strip() == "asyppo_kernels.integrations.verl_asyppo", done.stderr
    assert "AsyPPO is on in verl's trainer" in done.stderr


@pytest.mark.skipif(shutil.which("patch") is None, reason="patch is not installed")
def test_the_patch_of_the_page_applies() -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    [diff] = re.findall(r"^```diff\n(.*?)^```$", page, re.M | re.S)
    site = Path(trainer_base.__file__).parents[4]
    subprocess.run(["patch", "--dry-run", "--fuzz=0", "-p1"], input=diff, cwd=site, text=True, check=True)
