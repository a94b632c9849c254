"""The mini-critics: M value models, one after another behind one interface."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from asyppo.batch import Batch, MicroBatch
from asyppo.config import ConfigError
from asyppo.policy import load_pretrained
from asyppo_kernels import EnsembleValue, ensemble_value


class Critics(nn.Module):
    """M token classifiers with one label, the value of the position (``AutoModelForTokenClassification``)."""

    def __init__(self, models: list[PreTrainedModel], *, dtype: torch.dtype = torch.float32):
        super().__init__()
        for model in models:
            if not isinstance(getattr(model, "score", None), nn.Linear):
                raise ConfigError(
                    f"critic.model_name_or_path: {type(model).__name__} has no linear head called score, needs one"
                )
        self.models: Any = nn.ModuleList(models).eval()  # dropout would pass for disagreement
        self.dtype = dtype

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        num_critics: int,
        *,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> Critics:
        """Load M critics from one checkpoint; where it has no value head, each gets one of its own, drawn from torch's
        global generator.

        Raises ConfigError if it cannot be loaded or its vocabulary is not the policy's ``vocab_size``.
        """
        models = [_load_critic(path, device, attn_implementation, trust_remote_code) for _ in range(num_critics)]
        got = models[0].config.get_text_config().vocab_size
        if got != vocab_size:
            raise ConfigError(
                f"critic.model_name_or_path: {path!r} has a vocabulary of {got} tokens, needs the policy's "
                f"{vocab_size}: critics read the policy's tokens"
            )
        return cls(models, dtype=dtype)

    def __len__(self) -> int:
        return len(self.models)

    def forward(self, micro: MicroBatch, members: Iterable[int] | None = None) -> EnsembleValue:
        """Return values [K, N], mean and std [N] of the critics in ``members`` (None: all) at the N response tokens
        of ``micro``, each read at the position that predicts the token."""
        hidden, weight, bias = zip(
            *(self._hidden(self.models[m], micro) for m in (range(len(self)) if members is None else members)),
            strict=True,
        )
        return ensemble_value(torch.stack(hidden), torch.stack(weight), torch.stack(bias))

    def _hidden(self, model: PreTrainedModel, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=self.dtype != torch.float32):
            hidden = model.base_model(
                input_ids=micro.input_ids, attention_mask=micro.attention_mask, use_cache=False
            ).last_hidden_state
        hidden = micro.select(hidden).to(self.dtype)
        weight = model.score.weight[0].to(self.dtype)
        bias = weight.new_zeros(()) if model.score.bias is None else model.score.bias[0].to(self.dtype)
        return hidden, weight, bias

    @torch.no_grad()
    def values(self, batch: Batch, micros: Iterable[MicroBatch], members: Iterable[int] | None = None) -> Tensor:
        """Return float32 [K, B, T]: values of the critics in ``members`` (None: all); 0 on padding and on rows that
        are in no micro-batch."""
        chosen = list(range(len(self)) if members is None else members)
        value = batch.reward.new_zeros(len(chosen), *batch.reward.shape)
        for micro in micros:
            row, position = micro.grid
            value[:, row, position] = self(micro, chosen).value
        return value

    def save_pretrained(self, directory: str | Path) -> None:
        """Write one Hugging Face directory a critic: ``critic_0``, ``critic_1``, …"""
        for m, model in enumerate(self.models):
            model.save_pretrained(Path(directory) / f"critic_{m}")


def _load_critic(
    path: str, device: torch.device, attn_implementation: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a new value head is meant, not something to warn of
    try:
        model, report = load_pretrained(
            AutoModelForTokenClassification,
            path,
            device,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            num_labels=1,
            # The class's default of 0.1 would pollute the disagreement. Not every config knows the field.
            config_attributes={"classifier_dropout": 0.0},
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if "score.weight" in report["missing_keys"]:
        # Hidden states have entries of size 1 after the final norm: new values start out around 1 / sqrt(H).
        torch.nn.init.normal_(model.score.weight, std=1 / model.score.in_features)
        if model.score.bias is not None:
            torch.nn.init.zeros_(model.score.bias)
    return model
