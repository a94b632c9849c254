"""Settings below ``policy``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asyppo.config.setting import setting


@dataclass
class PolicyConfig:
    """The language model that is trained."""

    model_name_or_path: str | None = setting(None, elsewhere=("model",))
    """Directory or hub name of a Hugging Face causal language model. None needs a ``warm_start``."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward and backward pass. The weights and the optimizer stay float32, so that updates at a
    learning rate of 1e-6 do not round away. ``auto``: bfloat16 on a GPU, float32 on a CPU."""
    attn_implementation: str | None = setting(None, may_change=True)
    """Passed to ``from_pretrained``: ``sdpa``, ``eager``, ``flash_attention_2``; None lets transformers choose."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model, of the policy, the critics or the tokenizer."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the policy's backward pass, and compute the rest again: less memory, more time,
    the same gradients."""
    packing: bool | Literal["auto"] = setting("auto", may_change=True)
    """Lay sequences one behind the other in one row a micro-batch, without padding, instead of side by side. ``auto``:
    where attention takes sequences of any length, which is flash attention; others would make a mask of all pairs of
    tokens. A model that cannot (one with a state, or whose attention does not look at position ids) is found out at
    the start, and its micro-batches are padded, with a warning; rows of like length go together then. On a CPU ``auto``
    has each prompt in the row once, the responses to it behind it, where ``sdpa`` is the model's attention and looks
    at all tokens before; others are padded."""
    use_peft: bool = False
    """Train LoRA adapters instead of the weights. The weights under them are kept in ``dtype``, checkpoints hold the
    adapters alone, and the reference of ``beta`` is the model without them. A ``model_name_or_path`` that holds
    adapters goes on training those, whatever is set here."""
    lora_r: int = setting(16, at_least=1)
    """Rank of new adapters (TRL's default)."""
    lora_alpha: int = setting(32, at_least=1)
    """New adapters are scaled by ``lora_alpha / lora_r`` (TRL's default)."""
    lora_target_modules: list[str] | None = None
    """Ends of the names of layers that get adapters, such as ``[q_proj, v_proj]``; None: all linear layers but the
    head. The head gets none: the fused ops read its weight."""
    load_in_4bit: bool = False
    """QLoRA (arXiv 2305.14314): keep the linear layers under the adapters, but for the head, as 4-bit NormalFloats,
    which takes 0.52 bytes a parameter in place of 2 (in bfloat16), by bitsandbytes, which has to be installed. Needs
    adapters. Of several GPUs each has all of these layers."""
