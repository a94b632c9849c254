"""Tiny models of the families of causal language models that transformers has, with random weights and a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789abcdefghijklmnopqrstuvw+-=? "

# Names of the shape, as most families call it, and as those do that come from GPT-2 or from OPT.
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
HEADS_OF_8 = GROUPED | {"head_dim": 8}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
OPT = SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 32}
WINDOW = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


@dataclass(frozen=True)
class Family:
    """A family, or a variant of it whose attention or head is another."""

    kind: str
    """How its layers look back."""
    config: dict[str, Any]
    model_type: str = ""
    """transformers' name, where it is not the family's here."""


FULL, WINDOWED, SINKS, LATENT = "rotary", "rotary, windows", "rotary, sinks", "latent"
CAPPED, PARALLEL, ABSOLUTE, ALIBI = "rotary, caps", "rotary in parts", "learned positions", "alibi"
DIFFERENTIAL, STATES, HYBRID, RECURRENT = "differential", "state space", "hybrid", "recurrent"

FAMILIES: dict[str, Family] = {
    "apertus": Family(FULL, GROUPED),
    "arcee": Family(FULL, GROUPED),
    "bamba": Family(HYBRID, GROUPED | MAMBA2 | {"attn_layer_indices": [1]}),
    "bitnet": Family(FULL, GROUPED),
    "bloom": Family(ALIBI, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "codegen": Family(PARALLEL, GPT | {"n_ctx": 256, "rotary_dim": 4}),
    "cohere": Family(FULL, GROUPED | {"logit_scale": 0.0625}),
    "cohere2": Family(WINDOWED, HEADS_OF_8 | WINDOW | {"logit_scale": 0.25}),
    "deepseek_v3": Family(
        LATENT,
        GROUPED
        | ROUTED
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "diffllama": Family(DIFFERENTIAL, GROUPED),
    "dots1": Family(FULL, HEADS_OF_8 | ROUTED),
    "ernie4_5": Family(FULL, HEADS_OF_8),
    "exaone4": Family(WINDOWED, GROUPED | WINDOW),
    "falcon": Family(FULL, SHAPE),
    "falcon, alibi": Family(ALIBI, SHAPE | {"alibi": True, "new_decoder_architecture": False}, "falcon"),
    "falcon_h1": Family(HYBRID, GROUPED | MAMBA2 | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5}),
    "gemma": Family(FULL, HEADS_OF_8),
    "gemma2": Family(
        CAPPED,
        HEADS_OF_8
        | WINDOW
        | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3_text": Family(WINDOWED, HEADS_OF_8 | WINDOW | {"query_pre_attn_scalar": 8}),
    "glm4": Family(PARALLEL, HEADS_OF_8),
    "glm4_moe": Family(PARALLEL, HEADS_OF_8 | ROUTED),
    "gpt2": Family(ABSOLUTE, GPT),
    "gpt_bigcode": Family(ABSOLUTE, GPT),
    "gpt_neo": Family(
        ABSOLUTE,
        SHAPE | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gpt_neox": Family(PARALLEL, SHAPE),
    "gpt_oss": Family(SINKS, HEADS_OF_8 | LOCAL_EXPERTS | WINDOW),
    "gptj": Family(PARALLEL, GPT | {"rotary_dim": 4}),
    "granite": Family(
        FULL,
        GROUPED
        | {
            "logits_scaling": 8.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0156,
        },
    ),
    "granitemoehybrid": Family(
        HYBRID,
        GROUPED | LOCAL_EXPERTS | MAMBA2 | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 32},
    ),
    "helium": Family(FULL, HEADS_OF_8),
    "hunyuan_v1_dense": Family(FULL, HEADS_OF_8),
    "jamba": Family(
        HYBRID,
        GROUPED
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": Family(HYBRID, GROUPED | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64}),
    "llama": Family(FULL, GROUPED),
    "mamba": Family(STATES, SHAPE | {"state_size": 8}),
    "mamba2": Family(
        STATES, SHAPE | {"state_size": 8, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1, "chunk_size": 16}
    ),
    "minimax": Family(
        HYBRID,
        HEADS_OF_8
        | {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 16,
        },
    ),
    "mistral": Family(WINDOWED, GROUPED | WINDOW),
    "mixtral": Family(FULL, GROUPED | LOCAL_EXPERTS),
    "mpt": Family(ALIBI, {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2}),
    "nanochat": Family(FULL, GROUPED | {"final_logit_softcapping": 2.0}),
    "nemotron": Family(PARALLEL, GROUPED),
    "nemotron_h": Family(
        HYBRID,
        HEADS_OF_8
        | {
            "hybrid_override_pattern": "M*",
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "olmo2": Family(FULL, GROUPED),
    "olmo3": Family(WINDOWED, GROUPED | WINDOW),
    "olmo_hybrid": Family(HYBRID, GROUPED | DELTA),
    "olmoe": Family(FULL, GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": Family(ABSOLUTE, OPT),
    "opt, narrow": Family(ABSOLUTE, OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}, "opt"),
    "persimmon": Family(PARALLEL, SHAPE),
    "phi": Family(PARALLEL, SHAPE),
    "phi3": Family(FULL, GROUPED),
    "qwen2": Family(FULL, GROUPED),
    "qwen2, tied": Family(FULL, GROUPED | {"tie_word_embeddings": True}, "qwen2"),
    "qwen3": Family(FULL, HEADS_OF_8),
    "qwen3_moe": Family(FULL, HEADS_OF_8 | EXPERTS),
    "qwen3_next": Family(HYBRID, HEADS_OF_8 | EXPERTS | DELTA | {"shared_expert_intermediate_size": 16}),
    "recurrent_gemma": Family(
        HYBRID,
        SHAPE
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "lru_width": 32,
            "attention_window_size": 16,
            "logits_soft_cap": 2.0,
            "conv1d_width": 4,
        },
    ),
    "rwkv": Family(RECURRENT, SHAPE | {"attention_hidden_size": 32}),
    "seed_oss": Family(FULL, HEADS_OF_8),
    "smollm3": Family(FULL, GROUPED),
    "stablelm": Family(PARALLEL, GROUPED),
    "starcoder2": Family(FULL, GROUPED),
    "xglm": Family(
        ABSOLUTE,
        {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 256},
    ),
    "xlstm": Family(RECURRENT, {"hidden_size": 32, "num_heads": 2, "num_blocks": 2, "num_hidden_layers": 2}),
    "zamba2": Family(
        HYBRID,
        SHAPE
        | {
            "num_key_value_heads": 4,
            "attention_head_dim": 16,
            "layers_block_type": ["mamba", "hybrid"],
            "hybrid_layer_ids": [1],
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "num_mem_blocks": 1,
            "chunk_size": 16,
            "use_mamba_kernels": False,
        },
    ),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: <pad> 0, <eos> 1, <unk> 2, then ``CHARACTERS``."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def make(name: str, directory: Path) -> None:
    """Write a model of the family ``name``, and the tokenizer, to ``directory``.

    Weights are larger than a model's are before training, so that attention and next tokens are far from uniform.
    """
    torch.manual_seed(0)
    family, letters = FAMILIES[name], tokenizer()
    special = {"bos_token_id": None, "eos_token_id": letters.eos_token_id, "pad_token_id": letters.pad_token_id}
    config = AutoConfig.for_model(family.model_type or name, **family.config, **special, vocab_size=len(letters))
    model = AutoModelForCausalLM.from_config(config).eval()
    embeddings = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif parameter.dim() > 1 and not path.endswith("A_log"):
                parameter.mul_(6.0 if id(parameter) in embeddings else 2.0)
    model.save_pretrained(directory)
    letters.save_pretrained(directory)
