"""A run that trains on vLLM in a process of its own, small enough to be killed often."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ENGINE = {"kv_cache_memory_bytes": 2**26, "max_num_seqs": 64}
TRAINING = {
    "sampler": "vllm",
    "algorithm": "grpo",
    "max_steps": 200,
    "prompts_per_step": 4,
    "num_generations": 2,
    "max_completion_length": 8,
    "save_steps": 1,
    "save_total_limit": 2,
    "report_to": [],
    "eval": {"num_generations": 1},
    "reward_funcs": ["exact_match"],
    "run_name": "run",
    "resume": True,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: <pad> 0, <eos> 1, then a to p."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklmnop"])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def model(tied: bool) -> Qwen3ForCausalLM:
    """A small model with weights large enough for distributions far from uniform."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=96,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            intermediate_size=96,
            max_position_embeddings=128,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=tied,
        )
    ).eval()


def training_command(folder: Path, rows: str = "abcdefgh", **settings: Any) -> list[str]:
    """The command that begins the run ``folder/runs/run`` or goes on with it; a prompt a letter of ``rows``."""
    model(tied=True).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": c, "answer": "a"}) + "\n" for c in rows))
    chosen = TRAINING | {
        "output_dir": str(folder / "runs"),
        "policy": {"model_name_or_path": str(folder / "model")},
        "data": {"dataset_name": str(folder / "rows.jsonl"), "eval_size": 0},
        "vllm": {"engine_args": ENGINE},
        **settings,
    }
    (folder / "config.yaml").write_text(json.dumps(chosen))
    return [sys.executable, "-m", "asyppo", "train", "--config", str(folder / "config.yaml")]


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if (stat := _read(path)) and stat.rpartition(")")[2].split()[1] == str(pid)
    ]


def running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    status = _read(Path(f"/proc/{pid}/status"))
    return status is not None and "\nState:\tZ" not in status


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return None
