"""The example trains models by path, with its own rewards, and its callback sees every step."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from asyppo.config import CriticConfig

SCRIPT = Path(__file__).parents[2] / "examples" / "python_door.py"


def small_models(directory: Path) -> list[str]:
    """A policy and a smaller critic that read characters."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"0123456789: Countdwfrm"])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    for name, layers in (("policy", 2), ("critic", 1)):
        torch.manual_seed(layers)
        config = Qwen3Config(
            vocab_size=len(vocab), hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, intermediate_size=64, pad_token_id=0, eos_token_id=1,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return [str(directory / "policy"), str(directory / "critic")]


def test_rewards_rise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(SCRIPT))
    result = example["main"](
        *small_models(tmp_path),
        output_dir=str(tmp_path / "runs"),
        max_steps=12,
        max_completion_length=6,
        learning_rate=1e-2,
        critic=CriticConfig(learning_rate=1e-2),
    )
    printed = re.findall(r"^step (\d+): reward (\S+)$", capsys.readouterr().out, re.M)
    assert [int(step) for step, _ in printed] == list(range(1, 13))
    rewards = [float(reward) for _, reward in printed]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    AutoModelForCausalLM.from_pretrained(result.checkpoint / "policy")
