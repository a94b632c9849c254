"""A sequence classifier as a reward function, as in TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from asyppo.config import ConfigError
from asyppo.data.prompts import content_text
from asyppo.rewards.built_in import Reward

_AT_ONCE = 16  # texts in a forward pass


def is_model_name(name: str) -> bool:
    """Whether ``name``, of a reward, can be a directory or a hub name of a model."""
    return Path(name).expanduser().is_dir() or (name.count("/") == 1 and not name.startswith((".", "/", "~")))


class RewardModel:
    """``model(prompts, completions)``: the first logit of a sequence classifier for each prompt with its completion,
    chat messages as its tokenizer's template has them. It stays as it is."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, name: str | None = None):
        config: Any = model.config
        path = getattr(config, "_name_or_path", "")
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer or _tokenizer(path)
        self.__name__ = name or Path(path).name or type(model).__name__
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # The last token that is none of these is where the model reads the reward.
        config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    @classmethod
    def from_pretrained(cls, path: str, tokenizer: PreTrainedTokenizerBase | None = None) -> RewardModel:
        """Load one by directory or hub name. Raises ConfigError, also where the weights have no trained head."""
        path = str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=1, dtype="auto", use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # whatever the loading of any model raises
            text = " ".join(str(error).split())
            raise ConfigError(f"reward_funcs: cannot load the reward model {path!r}: {text}") from error
        if missing := sorted(report["missing_keys"]):
            raise ConfigError(
                f"reward_funcs: {path!r} has no weight {missing[0]}, needs a trained sequence classifier of one label"
            )
        return cls(model, tokenizer or _tokenizer(path), Path(path).name)

    @torch.inference_mode()
    def __call__(self, prompts: list[Any], completions: list[Any]) -> list[Reward]:
        """Return the rewards."""
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        rewards: list[Reward] = []
        for start in range(0, len(texts), _AT_ONCE):
            inputs = self.tokenizer(
                text=texts[start : start + _AT_ONCE],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            ).to(next(self.model.parameters()).device)
            rewards += self.model(**inputs).logits[:, 0].float().tolist()
        return rewards

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        if prompt[-1]["role"] == "assistant":  # whose answer was begun
            begun = content_text(prompt[-1].get("content")) + completion[0]["content"]
            prompt, completion = prompt[:-1], [{"role": "assistant", "content": begun}]
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        there = len(tokenizer) > len(tokenizer.all_special_tokens)  # transformers makes an empty one up
    except (OSError, ValueError, KeyError):
        there = False
    if not there:
        raise ConfigError(
            f"reward_funcs: the reward model {path!r} has no tokenizer beside it, needs one in "
            "reward_processing_classes"
        )
    return tokenizer
