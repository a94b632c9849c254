"""M value models, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from asyppo.data.batch import Batch, MicroBatch, micro_batches
from asyppo.distributed.processes import sum_over_ranks
from asyppo.distributed.sharding import between_replicas_once, decoder_layers, release, shard
from asyppo.models.checkpointing import checkpoint_layers
from asyppo.models.critics.base import Critics, Loss
from asyppo.models.critics.inputs import added_to_embedding, names_of
from asyppo.models.critics.loading import load_value_models, loss_of, save_value_model, value_head
from asyppo.models.head import any_dtype_attention
from asyppo.models.hub import Later, SaveDtype, use_liger_kernels
from asyppo.models.packing import known_sequences
from asyppo.models.shards import WeightFiles, files_of, read_shards, weights_come_later


class OneByOneCritics(Critics):
    """M token classifiers with one label, the value of the position, of any architecture that transformers has."""

    def __init__(
        self, models: Sequence[Any], *, dtype: torch.dtype = torch.float32, gradient_checkpointing: bool = False
    ):
        """``models`` have a ``base_model`` and a ``value_head``; float32 weights, while passes run in ``dtype``. Raises
        ConfigError if a model has no such head."""
        super().__init__()
        for model in models:
            value_head(model)
        self.models = nn.ModuleList(models).eval()  # dropout would pass for disagreement
        self.dtype, self.config = dtype, models[0].config
        self.policy_inputs, self.loss = names_of(models), loss_of(models)
        for model in models if gradient_checkpointing else ():
            later = weights_come_later(model)
            with nullcontext() if later else self._autocast(model), any_dtype_attention(model.base_model):
                checkpoint_layers(model.base_model, "critic.gradient_checkpointing", check=not later)

    @classmethod
    def from_pretrained(
        cls,
        path_or_paths: str | Path | Sequence[str | Path],
        num_critics: int,
        *,
        vocab_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> OneByOneCritics:
        """Load M critics; see ``load_value_models``. Raises ConfigError."""
        models = load_value_models(
            path_or_paths,
            num_critics,
            vocab_size=vocab_size,
            device=torch.device(device),
            attn_implementation=attn_implementation,
        )
        return cls(models, dtype=dtype, gradient_checkpointing=gradient_checkpointing)

    def forward(self, m: int, micro: MicroBatch, read: Tensor | None = None) -> Tensor:
        """Return what the head of critic ``m`` gives [N] at the response tokens of ``micro``, of which ``value_of``
        makes values. Where it has ``policy_inputs``, it reads ``read`` beside the tokens."""
        self._padding.add(micro.tokens, micro.input_ids.numel())
        model = self.models[m]
        with added_to_embedding(model, read), self._autocast(model), known_sequences(None):
            # Padding is on the right, where causal attention does not look.
            hidden = model.base_model(input_ids=self.readable(micro.input_ids), use_cache=False).last_hidden_state
        hidden = micro.select(hidden).to(self.dtype)
        head = value_head(model)
        bias = None if head.bias is None else head.bias.to(self.dtype)
        return self.ops.ensemble_value(hidden[None], head.weight.to(self.dtype), bias).value[0]

    def _autocast(self, model: Any) -> torch.autocast:
        return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=self.dtype != torch.float32)

    def shard(self, mesh: DeviceMesh) -> None:
        """See Critics."""
        if mesh.device_type == "cuda" and next(self.parameters()).device.type != "cuda":
            for model in self.models:
                use_liger_kernels(model)
        shard(self, decoder_layers(self), mesh, self.dtype)

        def of(name: str) -> list[tuple[WeightFiles, str]]:
            m, _, own = name.removeprefix("models.").partition(".")
            files = files_of(self.models[int(m)])
            assert files is not None
            return [(files, own)]

        if weights_come_later(self):
            read_shards(self, of, mesh.device_type)

    @torch.no_grad()
    def values(self, batch: Batch, max_tokens: int) -> Tensor:
        """See Critics."""
        everything = torch.arange(len(batch), device=batch.tokens.device)
        return torch.stack([self._values(m, batch, everything, max_tokens) for m in range(len(self))])

    @torch.no_grad()
    def own_values(self, batch: Batch, shares: Sequence[Tensor], max_tokens: int) -> Tensor:
        """See Critics."""
        return torch.stack([self._values(m, batch, rows, max_tokens) for m, rows in enumerate(shares)])

    def _values(self, m: int, batch: Batch, rows: Tensor, max_tokens: int) -> Tensor:
        value = torch.zeros_like(batch.reward)
        for micro in micro_batches(batch, rows, max_tokens):
            value[micro.grid] = self.value_of(self(m, micro, self.read(batch, micro)))
        release(self)
        return sum_over_ranks(value)

    def backward(self, batch: Batch, shares: Sequence[Tensor], loss: Loss, max_tokens: int) -> Tensor:
        """See Critics."""
        total = torch.zeros(len(self), device=batch.tokens.device)
        for m, rows in enumerate(shares):
            for micro in between_replicas_once(self, micro_batches(batch, rows, max_tokens)):
                part = loss(m, micro, self(m, micro, self.read(batch, micro)))
                part.backward()
                total[m] += part.detach()
        return sum_over_ranks(total)

    def save_pretrained(self, directory: str | Path, dtype: SaveDtype = "auto", later: Later | None = None) -> None:
        """Write ``critic_0``, ``critic_1``, …: for ``AutoModelForTokenClassification``, or, where the family has no
        such class, for ``AutoModel`` with the head in ``value_head.safetensors``."""
        for m, model in enumerate(self.models):
            save_value_model(model, Path(directory) / f"critic_{m}", dtype, later)
