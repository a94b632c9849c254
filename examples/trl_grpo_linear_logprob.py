"""TRL's GRPOTrainer with its per-token log-probs and entropies from ``linear_logprob``.

The trainer is TRL's own: ``integrations.trl.enable()`` puts the op where TRL's fused head computes them, which
``pytest bench`` compares with the op.

Run it: ``python examples/trl_grpo_linear_logprob.py`` trains a tiny model for three steps on a CPU; it needs trl.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import asyppo_kernels.integrations.trl


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklm"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Build a model of two small layers."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config)


def share_of_a(completions: list[str], **_: Any) -> list[float]:
    """Reward: how much of the completion is the letter a."""
    return [completion.count("a") / max(len(completion), 1) for completion in completions]


def main() -> None:
    """Train for three steps; TRL prints its metrics."""
    asyppo_kernels.integrations.trl.enable()
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=make_model(tokenizer),
            reward_funcs=share_of_a,
            args=trl.GRPOConfig(
                output_dir=folder,
                max_steps=3,
                learning_rate=1e-2,
                per_device_train_batch_size=16,
                num_generations=8,
                max_completion_length=12,
                temperature=0.9,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": ["a", "bcd", "efghij", "klm"]}),
            processing_class=tokenizer,
        )
        trainer.train()


if __name__ == "__main__":
    main()
