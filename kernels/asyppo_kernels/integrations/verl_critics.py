"""M critics as one Hugging Face model, a token classifier with M values a token, which verl's critic worker loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import TokenClassifierOutput


class CriticsConfig(PretrainedConfig):
    """``critic``: the configuration of each, as a dictionary; ``num_critics``: M."""

    model_type = "asyppo_critics"

    def __init__(self, critic: dict[str, Any] | None = None, num_critics: int = 2, **kwargs: Any):
        super().__init__(**kwargs)
        self.critic, self.num_critics = critic or {}, num_critics
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
            if name in self.critic:  # verl reads them
                setattr(self, name, self.critic[name])

    def critic_config(self) -> Any:
        """The configuration of a critic."""
        fields = {key: value for key, value in self.critic.items() if key != "model_type"}
        return AutoConfig.for_model(self.critic["model_type"], **fields)


class CriticsForTokenClassification(PreTrainedModel):
    """M token classifiers of one label on the same tokens; logits [B, T, M]."""

    config_class = CriticsConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True

    def __init__(self, config: CriticsConfig):
        super().__init__(config)
        critic = config.critic_config()
        critic.num_labels = 1
        critic._attn_implementation = config._attn_implementation
        critic.dtype = torch.get_default_dtype()  # the one that is asked for
        kind = AutoModelForTokenClassification.from_config
        self.critics = nn.ModuleList(kind(critic, dtype=critic.dtype) for _ in range(config.num_critics))
        self._no_split_modules = self.critics[0]._no_split_modules
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, **inputs: Any) -> TokenClassifierOutput:
        """Values as ``logits``; ``inputs`` go to each critic."""
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", "return_dict")}
        values = [critic(input_ids=input_ids, return_dict=True, **inputs).logits for critic in self.critics]
        return TokenClassifierOutput(logits=torch.cat(values, dim=-1))


AutoConfig.register(CriticsConfig.model_type, CriticsConfig, exist_ok=True)
AutoModelForTokenClassification.register(CriticsConfig, CriticsForTokenClassification, exist_ok=True)


def save_critics(model: str, num_critics: int, folder: str | Path, *, seed: int = 0) -> None:
    """Write a model of ``num_critics`` critics into ``folder``, with the tokenizer: all from ``model``, a directory or
    a hub name, with value heads that differ. ``critic.model.path`` of verl's settings is then ``folder``."""
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    each = [AutoModelForTokenClassification.from_pretrained(model, num_labels=1) for _ in range(num_critics)]
    made = CriticsForTokenClassification(CriticsConfig(each[0].config.to_dict(), num_critics))
    for mine, theirs in zip(made.critics, each, strict=True):
        mine.load_state_dict(theirs.state_dict())
    made.to(each[0].dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
