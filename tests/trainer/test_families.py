"""Models of four families: built from configs, saved, trained and evaluated by path through the command line on chat
messages, and loaded by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from asyppo.cli.main import main
from asyppo.run.directory import read_jsonl

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"tie_word_embeddings": True},
    "qwen2": {},
    "llama": {},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
}
REWARD = '''
def digits(prompts, completions, **columns):
    """1 where most characters of the answer are digits, as the answer's are."""
    texts = [completion[-1]["content"] if isinstance(completion, list) else completion for completion in completions]
    return [float(sum(c.isdigit() for c in text) > 0.5 * len(text)) for text in texts]
'''


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, those of the roles, and a chat template."""
    special = ["<pad>", "<end>", "<unk>", "<system>", "<user>", "<assistant>"]
    vocab = {token: i for i, token in enumerate([*special, *"0123456789abcdefghij+-= "])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<system>", "<user>", "<assistant>"],
        chat_template=TEMPLATE,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_config_to_plain_transformers(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = chat_tokenizer()
    for name, layers in (("policy", 2), ("critic", 1)):
        shape = SHAPE | FAMILIES[family] | {"num_hidden_layers": layers, "vocab_size": len(tokenizer)}
        torch.manual_seed(layers)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(name)
        tokenizer.save_pretrained(name)
    messages = [[{"role": "system", "content": "add"}, {"role": "user", "content": f"{i}+{i + 1}="}] for i in range(40)]
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"prompt": m, "answer": str(2 * i + 1)}) + "\n" for i, m in enumerate(messages))
    )
    Path("reward.py").write_text(REWARD)
    Path("my.yaml").write_text(
        "{max_steps: 3, prompts_per_step: 4, num_generations: 4, max_completion_length: 8, num_mini_batches: 1,"
        " learning_rate: 0.02, run_name: mine, reward_funcs: ['reward.py:digits'],"
        " policy: {model_name_or_path: policy}, critic: {model_name_or_path: critic, learning_rate: 0.001},"
        " data: {dataset_name: rows.jsonl, eval_size: 8}, eval: {num_generations: 4}}"
    )

    assert main(["train", "--config", "my.yaml"]) == 0
    rows = read_jsonl(Path("runs/mine/metrics.jsonl"))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["actor/grad_norm"] > 0 and row["critic/vf_loss"] > 0 for row in rows[1:])
    assert not any(row["actor/skipped_updates"] or row["critic/skipped_updates"] for row in rows[1:])
    capsys.readouterr()

    # The run's last checkpoint gives what training measured, and learned something on the way.
    assert main(["eval", "--model", "runs/mine", "--out", "evaluated"]) == 0
    result = json.loads(Path("evaluated/eval.json").read_text())
    assert result["all"]["avg@4"]["value"] == rows[-1]["eval/accuracy"]
    assert result["all"]["prompts"] == 8
    samples = read_jsonl(Path("evaluated/samples.jsonl"))
    assert len(samples) == 8 * 4
    assert "add" in json.dumps(samples[0]["prompt"])

    # Other people's tools load it: the trained weights, the tokenizer with its template, and the critics.
    checkpoint = Path("runs/mine/checkpoint-3")
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in ("policy", checkpoint / "policy"))
    assert type(after) is type(before)
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))
    loaded = AutoTokenizer.from_pretrained(checkpoint / "policy")
    ids = loaded.apply_chat_template(messages[0], add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert loaded.decode(ids[0]) == "<system>add<end><user>0+1=<end><assistant>"
    assert after.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    if family == "gemma3_text":  # transformers has no token classifier of it: backbone, and the head beside it
        backbone = AutoModel.from_pretrained(checkpoint / "critic_1")
        assert backbone(ids).last_hidden_state.shape == (1, ids.shape[1], SHAPE["hidden_size"])
        assert load_file(checkpoint / "critic_1" / "value_head.safetensors")["weight"].shape == (
            1,
            SHAPE["hidden_size"],
        )
    else:
        critic = AutoModelForTokenClassification.from_pretrained(checkpoint / "critic_1", num_labels=1)
        assert critic(ids).logits.shape == (1, ids.shape[1], 1)
