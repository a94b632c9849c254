"""What the trainer takes as a policy, critics and a tokenizer: objects, models, or where they lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from asyppo.config import ConfigError, PolicyConfig
from asyppo.models.loading import policy_of
from asyppo.run.directory import read_jsonl
from asyppo.trainer import AsyPPOTrainer

Make = Callable[..., Any]
ROWS = [{"prompt": text} for text in ("ab", "cde", "f", "ghij")]


def shorter(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
    """Short completions are better."""
    return [-float(len(text)) for text in completions]


@pytest.fixture
def paths(tmp_path: Path, tiny_lm: Make, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Directories of a policy and of what the critics start from."""
    for name, model in (("policy", tiny_lm()), ("critic", tiny_lm(seed=1, num_hidden_layers=1))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("policy", "critic")}


def rewards(trainer: AsyPPOTrainer) -> list[dict[str, Any]]:
    """Metrics of a run without what depends on the clock."""
    rows = read_jsonl(trainer.train().run.metrics)
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in rows]


def test_paths_and_models_train_alike(paths: dict[str, str], tiny_config: Make, tiny_lm: Make) -> None:
    def trainer(name: str, policy: Any, **more: Any) -> AsyPPOTrainer:
        config = tiny_config(run_name=name, max_steps=2, temperature=0.7)
        arguments = {"policy": policy, "critics": paths["critic"], "reward_funcs": [shorter]} | more
        return AsyPPOTrainer(**arguments, train_dataset=ROWS, config=config)

    by_path = trainer("path", paths["policy"])
    assert by_path.policy.temperature == 0.7
    assert by_path.critics is not None
    assert len(by_path.critics) == 2
    heads = [model.score.weight for model in by_path.critics.models]
    assert not torch.equal(heads[0], heads[1])
    # Value heads follow from the seed, whatever else was drawn.
    torch.manual_seed(99)
    of_model = trainer("model", tiny_lm(), tokenizer=by_path.tokenizer)
    assert rewards(by_path) == rewards(of_model)
    # Weights in less than float32 would not move at a learning rate of 1e-6.
    assert (
        next(trainer("half", tiny_lm().bfloat16(), tokenizer=by_path.tokenizer).policy.parameters()).dtype.itemsize == 4
    )


@pytest.mark.parametrize("lora", [False, True])
def test_weights_that_are_read_later_are_the_same(paths: dict[str, str], tiny_config: Make, lora: bool) -> None:
    config = tiny_config(policy=PolicyConfig(use_peft=lora, lora_r=2, lora_alpha=4))
    torch.manual_seed(0)
    whole = policy_of(paths["policy"], config)
    torch.manual_seed(0)
    later = policy_of(paths["policy"], config, sharded=True)
    assert all(p.is_meta is ("lora_" not in name) for name, p in later.named_parameters())
    later.read_weights("cpu")
    for (name, weight), (other, found) in zip(whole.named_parameters(), later.named_parameters(), strict=True):
        assert (name, weight.requires_grad) == (other, found.requires_grad)
        assert torch.equal(weight, found), name
    ids = torch.arange(6)[None]
    assert torch.equal(whole.model(input_ids=ids).logits, later.model(input_ids=ids).logits)

    file = Path(paths["policy"]) / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"the weight model.layers.1.mlp.up_proj.weight in .*safetensors has NaN"):
        policy_of(paths["policy"], config, sharded=True).read_weights("cpu")


def test_other_families_are_loaded_whole(tmp_path: Path, tiny_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    shape = {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 19}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape)).save_pretrained(tmp_path)
    policy = policy_of(str(tmp_path), tiny_config(), sharded=True)
    assert {p.device.type for p in policy.parameters()} == {"cpu"}
    assert "its family, gpt2, is none of llama, mistral, qwen2, qwen3" in caplog.text


def test_what_does_not_fit(paths: dict[str, str], tiny_config: Make, tiny_lm: Make) -> None:
    def trainer(policy: Any, critics: Any, **fields: Any) -> AsyPPOTrainer:
        config = tiny_config(**fields)
        return AsyPPOTrainer(policy=policy, critics=critics, reward_funcs=[shorter], train_dataset=ROWS, config=config)

    assert trainer(paths["policy"], None, algorithm="grpo").critics is None
    with pytest.raises(ConfigError, match=r"critics: got '.*critic', needs None for algorithm grpo"):
        trainer(paths["policy"], paths["critic"], algorithm="grpo")
    with pytest.raises(ConfigError, match="critics: got 0, needs 2 for algorithm asyppo"):
        trainer(paths["policy"], None)
    with pytest.raises(ConfigError, match="cannot load '/no/such'"):
        trainer("/no/such", paths["critic"])
    with pytest.raises(ConfigError, match="has no tokenizer"):
        trainer(tiny_lm(), paths["critic"])
