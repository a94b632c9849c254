"""What a Python program may give the trainer, as users of TRL have it: each works, or is one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from asyppo.config import ConfigError, DataConfig
from asyppo.data.given import given_eval_rows, given_rows
from asyppo.data.rows import Rows
from asyppo.models.loading import critics_of, given_critics, given_policy, policy_of
from asyppo.run.directory import read_jsonl
from asyppo.trainer import AsyPPOTrainer

Make = Callable[..., Any]
ROWS = [{"prompt": text, "answer": i} for i, text in enumerate(("ab", "cde", "f", "ghij"))]


def shorter(completions: list[str], **_: Any) -> list[float]:
    """Short completions are better."""
    return [-float(len(text)) for text in completions]


def read(rows: Any) -> list[Any]:
    """What the trainer reads of rows."""
    return list(Rows("rows", rows, range(len(rows))))


@pytest.mark.parametrize(
    "given",
    [
        lambda: tuple(ROWS),
        lambda: datasets.Dataset.from_list(ROWS),
        lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        lambda: (row for row in ROWS),
        lambda: pd.DataFrame(ROWS),
        lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)),
        lambda: {"train": ROWS, "test": []},
    ],
)
def test_rows_of_all_kinds(given: Callable[[], Any]) -> None:
    assert read(given_rows(given(), "train_dataset", "train", DataConfig())) == ROWS


def test_empty_cells_are_none() -> None:
    rows = [{"prompt": "a", "answer": 1.0, "task": None}, {"prompt": "b", "answer": None, "task": "easy"}]
    table = pd.DataFrame(rows)  # of numbers, an empty cell is NaN
    assert read(given_rows(table, "train_dataset", "train", DataConfig())) == rows


def test_messages_of_all_kinds() -> None:
    message = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": "b"}
    for prompt in ((message,), np.array([message], dtype=object), [message]):
        assert read([{"prompt": prompt}])[0]["prompt"] == [message]
    # Without a prompt the messages are it, up to the answer, which stays in its column.
    assert read([{"messages": [message, answer]}]) == [{"messages": [message, answer], "prompt": [message]}]
    assert read([{"messages": [message]}])[0]["prompt"] == [message]


def test_streams_end_where_they_are_told_to() -> None:
    def endless() -> Any:
        while True:
            yield ROWS[0]

    assert len(given_rows(endless(), "train_dataset", "train", DataConfig(max_train_rows=5))) == 5


def test_several_data_sets_for_evaluation() -> None:
    given = {"easy": ROWS[:2], "hard": datasets.Dataset.from_list(ROWS[2:])}
    rows = given_eval_rows(given, "eval_dataset", DataConfig())
    assert [row["task"] for row in rows] == ["easy"] * 2 + ["hard"] * 2
    assert given_eval_rows({"test": ROWS, "train": []}, "eval_dataset", DataConfig()) == ROWS
    assert given_eval_rows(None, "eval_dataset", DataConfig()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rows.jsonl", "train_dataset: got 'rows.jsonl', needs rows; a file or a name on the hub is data.dataset_name"),
        ({"test": ROWS, "dev": ROWS}, "train_dataset: got dict of test, dev, needs one of them, or one named train"),
        (3, "train_dataset: got int, needs a sequence of rows, a data set or a stream of them"),
        ([], "train_dataset: got no rows, needs at least one"),
        ([3, "a"], "data.bad_rows: train_dataset has 2 bad rows: row 1: no row but 3; row 2: no row but 'a'; needs"),
    ],
)
def test_rows_that_are_none(given: Any, message: str, tiny_config: Make, tiny_trainer: Make) -> None:
    with pytest.raises(ConfigError) as error:
        tiny_trainer(tiny_config(), shorter, train_dataset=given)
    assert str(error.value).startswith(message)


@pytest.fixture
def paths(tmp_path: Path, tiny_lm: Make, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Directories of a policy and of critics of two shapes."""
    models = (("policy", tiny_lm()), ("critic", tiny_lm(1, num_hidden_layers=1)), ("other", tiny_lm(2)))
    for name, model in models:
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name, _ in models}


def test_a_peft_model_trains_its_adapters(
    paths: dict[str, str], tiny_lm: Make, tokenizer: PreTrainedTokenizerFast, tiny_config: Make
) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(paths["policy"]), lora)
    seen: list[int] = []

    def reward(completions: list[str], trainer_state: Any, log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        seen.append(trainer_state.global_step)
        log_metric("own/metric", 0.25)
        log_extra("own", completions)
        return shorter(completions)

    config = tiny_config(max_steps=2, report_to=[])
    result = AsyPPOTrainer(
        policy=model,
        critics=[paths["critic"], paths["other"]],
        reward_funcs=reward,
        train_dataset=pd.DataFrame(ROWS),
        eval_dataset=iter(ROWS),
        config=config,
    ).train()
    saved = {path.name for path in (result.checkpoint / "policy").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    adapter = load_file(result.checkpoint / "policy" / "adapter_model.safetensors")
    assert any(bool(weight.any()) for name, weight in adapter.items() if "lora_B" in name)
    # What reward functions see and log, before the first step, in each, and after the last.
    assert seen == [0, 0, 1, 2]
    rows = read_jsonl(result.run.metrics)
    assert [row.get("own/metric") for row in rows] == [None, 0.25, 0.25]
    assert [row.get("eval/own/metric") for row in rows] == [0.25, None, 0.25]
    assert all(row["extra"]["own"] == row["completion"] for row in read_jsonl(result.run.samples))


def test_policies_and_critics_that_are_none(paths: dict[str, str], tiny_lm: Make, tiny_config: Make) -> None:
    prefix = get_peft_model(tiny_lm(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    head = get_peft_model(tiny_lm(), LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]))
    for policy, message in (
        (prefix, "policy: got a PeftModel with PrefixTuningConfig, needs adapters in the layers"),
        (head, "policy: got a PeftModel that adapts or saves the head, needs layers below it"),
        (3, "policy: got int, needs a causal language model, or where one is"),
    ):
        with pytest.raises(ConfigError, match=message):
            given_policy(policy)
    config = tiny_config()
    for critics, message in (
        ([tiny_lm(), tiny_lm()], "critics: got Qwen3ForCausalLM, needs a directory or hub name of the checkpoint"),
        (["a", "b", "c"], "critics: got 3 checkpoints, needs 1 or 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            given_critics(critics, config)
    assert given_critics([Path(paths["critic"])] * 2, config) == paths["critic"]
    policy = policy_of(paths["policy"], config)
    alike = critics_of([paths["policy"], paths["other"]], config, policy)
    assert [type(critics_of(paths["critic"], config, policy))] == [type(alike)]


def test_weights_that_are_not_finite_are_named(paths: dict[str, str], tiny_lm: Make, tiny_config: Make) -> None:
    file = Path(paths["policy"]) / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ConfigError, match=rf"policy.model_name_or_path: the weight {name} in {file} has NaN or"):
        policy_of(paths["policy"], tiny_config())
    model = tiny_lm()
    model.lm_head.weight.data[0, 0] = torch.inf
    with pytest.raises(
        ConfigError, match=r"policy: the weight lm_head\.weight has NaN or infinity in it; needs finite"
    ):
        policy_of(model, tiny_config())


def test_an_adapter_whose_model_is_not_found(
    tmp_path: Path, tiny_lm: Make, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = get_peft_model(tiny_lm(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    model.peft_config["default"].base_model_name_or_path = "models/base"
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError) as error:
        policy_of(str(tmp_path / "adapter"), tiny_config())
    message = str(error.value)
    assert f"cannot load the model 'models/base' under the adapter '{tmp_path}/adapter': " in message
    assert f"there is no such directory here, in {Path.cwd()}: needs base_model_name_or_path in its adapter" in message
    assert "\n" not in message
