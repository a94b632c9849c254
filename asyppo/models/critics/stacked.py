"""M critics as one model: each layer's parameters stacked, each launch for all."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from asyppo.config import ConfigError
from asyppo.data.batch import Batch, MicroBatch, micro_batches, share_micro_batches
from asyppo.data.sharing import SharedPrompts
from asyppo.distributed.processes import sum_over_ranks
from asyppo.distributed.sharding import (
    between_replicas_once,
    member,
    placement_of_stacked,
    release,
    shard,
    sum_whole_gradients,
)
from asyppo.models.critics.base import Critics, Loss
from asyppo.models.critics.inputs import NAME, PolicyInputs, names_of
from asyppo.models.critics.layers import (
    MakeLinear,
    StackedEmbedding,
    StackedLayer,
    StackedLinear,
    StackedNorm,
    StackedPolicyInputs,
    tie,
)
from asyppo.models.critics.layout import Extent, Layout, SharedLayout, VarlenAttention
from asyppo.models.critics.loading import load_value_models, loss_of, save_value_model
from asyppo.models.families import FAMILIES, why_unknown
from asyppo.models.hub import Later, SaveDtype
from asyppo.models.quantized import kept_whole
from asyppo.models.shards import WeightFiles, files_of, read_shards

OWN = {"score": "score", "project": NAME}
"""Parts of the stack that are a value model's own, not its body's, and their names there."""
WORTH_SHARING = 1 / 6
"""Share of the tokens that prompts read once have to save: attention goes prompt by prompt then, which costs a part."""


class Stacked(Critics):
    """M critics whose layers are computed together; ``critics(input_ids, attention_mask)`` gives all values.

    Sequences are packed. Attention is ``torch.nn.attention.varlen.varlen_attn`` on a GPU in bfloat16 or float16, and
    else ``scaled_dot_product_attention``; ``varlen`` may be set to another function of its signature.
    """

    files: Sequence[WeightFiles | None] = ()
    """Where weights lie that are read once they are sharded, of each of the models that layers are stacked of."""

    def build(
        self,
        bodies: Sequence[Any],
        heads: Sequence[nn.Linear],
        *,
        dtype: torch.dtype,
        gradient_checkpointing: bool,
        inputs: Sequence[PolicyInputs] = (),
        linear: MakeLinear = StackedLinear,
    ) -> None:
        """Stack the layers of ``bodies``, the M ``heads`` and the M projections of ``inputs``, if there are any. Passes
        run in ``dtype``."""
        self.dtype, self.config = dtype, bodies[0].config
        window = FAMILIES.get(type(bodies[0]), lambda *_: None)  # side critics have none
        self.build_input(bodies)
        if inputs:
            self.policy_inputs = inputs[0].names
            self.project = StackedPolicyInputs(inputs)
        self.layers = nn.ModuleList(
            StackedLayer(counterparts, window(counterparts[0], self.config), gradient_checkpointing, linear)
            for counterparts in zip(*(body.layers for body in bodies), strict=True)
        )
        self.norm = StackedNorm([body.norm for body in bodies])
        self.score = StackedLinear(heads)
        # The family's own, so that every kind of rotary embedding works.
        self.rotary_emb = bodies[0].rotary_emb
        self.mesh: DeviceMesh | None = None
        self.varlen: VarlenAttention | None = None
        self._choose_attention(self.score.weight.device.type)

    def build_input(self, bodies: Sequence[Any]) -> None:
        """Stack what makes the first layer's input of what is read."""
        self.embed_tokens = StackedEmbedding([body.embed_tokens for body in bodies])

    def _choose_attention(self, device_type: str) -> None:
        if self.dtype in (torch.bfloat16, torch.float16) and device_type == "cuda":
            from torch.nn.attention import varlen

            self.varlen = cast(VarlenAttention, varlen.varlen_attn)

    @abstractmethod
    def leaf(self, m: int, name: str) -> tuple[nn.Module, str]:
        """Return the module of ``models[m]`` and the name in it of what is a view of the parameter ``name``."""

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Name and value of the parameters that are not frozen; all have a leading axis M."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def _apply(self, fn: Any, recurse: bool = True) -> Stacked:
        """Moving the stack (``to``, ``cuda``) moves the models' weights with it."""
        super()._apply(fn, recurse)
        self.tie_models()
        return self

    def tie_models(self) -> None:
        """Make the weights of ``models`` views of the stack again, after its parameters have been replaced."""
        for name, parameter in self.trained_parameters():
            leaves = [self.leaf(m, name) for m in range(len(self))]
            tie([module for module, _ in leaves], leaves[0][1], parameter, self.mesh)

    def shard(self, mesh: DeviceMesh) -> None:
        """See Critics: each rank has a piece of every critic, so that a critic's weights are still a view.

        What no dimension but the first divides evenly into stays whole on every rank, and so does ``kept_whole``.
        """
        place = placement_of_stacked(mesh)
        self._read_weights({name for name, p in self.named_parameters() if place(p) is None}, mesh.device_type)
        whole = {p for p in self.parameters() if place(p) is None} | kept_whole(self)
        self._choose_attention(mesh.device_type)
        shard(self, self.layers, mesh, self.dtype, whole=whole, shard_placement_fn=place)
        self._read_weights({name for name, _ in self.named_parameters()}, mesh.device_type)
        self.mesh = mesh
        self.tie_models()

    def _read_weights(self, names: set[str], device_type: str) -> None:
        """Read the parameters ``names``, as far as they are still to be read."""
        files = [one for one in self.files if one is not None]

        def of(name: str) -> list[tuple[WeightFiles, str]]:
            return [(one, f"model.{name}") for one in files]

        if files:
            read_shards(self, of, device_type, names)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        known: Extent | None = None,
        inputs: Tensor | None = None,
        states: Tensor | None = None,
        *,
        sharings: Sequence[SharedPrompts] = (),
        outputs: bool = False,
    ) -> Tensor:
        """Return values, float32 and differentiable.

        Args:
            input_ids: int64 [B, T], read by all critics, or [M, B, T], to each its own.
            attention_mask: of the same shape, 0 on padding, on the left, the right or both sides; None: no padding.
                The value of padding is some number. Tokens in between may be left out, too, unless a layer has a
                window: that is a ValueError.
            positions: int64 [n], or [M, n] to each critic its own: the places row * T + column whose values are
                wanted, none of them padding; None: all.
            known: what the host knows of ``attention_mask``; None: it is read from the device.
            inputs: float32 [B, T, F] or [M, B, T, F], as ``input_ids``: what critics with ``policy_inputs`` read beside
                the tokens.
            states: [S, D], for side critics alone: hidden states, whose rows ``input_ids`` are.
            sharings: of sequences that share their prompts, which are one row of ``input_ids`` then, without inputs and
                padded at the end alone; one, or M, to each critic its own.
            outputs: what the heads give, of which ``value_of`` makes values.

        Returns:
            [M, B, T], or [M, n] given positions.
        """
        count = len(self)
        own = input_ids if input_ids.dim() == 3 else input_ids[None]
        if own.dim() != 3 or len(own) not in (1, count):
            raise ValueError(f"input_ids: got shape {list(input_ids.shape)}, needs [B, T] or [M, B, T], M = {count}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: got shape {list(attention_mask.shape)}, needs that of input_ids, "
                f"{list(input_ids.shape)}"
            )
        read = [*input_ids.shape, len(self.policy_inputs)] if self.policy_inputs else None
        if read != (None if inputs is None else list(inputs.shape)):
            got = None if inputs is None else f"shape {list(inputs.shape)}"
            raise ValueError(f"inputs: got {got}, needs {read} of critics with policy_inputs {self.policy_inputs}")
        mask = torch.ones_like(own, dtype=torch.bool) if attention_mask is None else attention_mask.view_as(own).bool()
        if sharings:
            layout: Layout = SharedLayout(self.readable(own.flatten(1)), sharings)
            self._padding.add(sum(sharing.position_ids.numel() for sharing in sharings), layout.tokens.numel())
        else:
            layout = Layout(self.readable(own), mask, count, self.varlen, known)
            self._padding.add(mask.sum(), layout.tokens.numel())
        beside = None if inputs is None else layout.take(inputs.view(*own.shape, -1))
        wanted = positions
        if wanted is None:
            everything = torch.arange(mask[0].numel(), device=mask.device)
            wanted = everything.expand(count, -1) if len(mask) > 1 else everything
        found = self._outputs(self._read(layout, beside, states), layout, layout.index(wanted))
        found = found if outputs else self.value_of(found)
        return found.view(count, *own.shape[1:]) if positions is None else found

    def _read(self, layout: Layout, beside: Tensor | None, states: Tensor | None) -> Tensor:
        """The first layer's input [M, N, H], of tokens and of what is ``beside`` them, [K, N, F]."""
        if beside is None:
            return self.embed_tokens(layout.tokens).to(self.dtype).expand(len(self), -1, -1)
        return self.embed_tokens.beside(layout.tokens, beside, self.project.weight, self.dtype)

    def _outputs(self, hidden: Tensor, layout: Layout, index: Tensor) -> Tensor:
        """What the heads give [M, n] at the tokens ``index``, [n] or [M, n], of the first layer's input."""
        update = None
        cos, sin = layout.rotary(self.rotary_emb)
        for layer in self.layers:
            hidden, update = layer(hidden, update, cos, sin, layout.attend)
        # From here on only what is read.
        hidden = _take(hidden, index)
        hidden, _ = self.norm(hidden, None if update is None else _take(update, index))
        # Mean and deviation are left to the advantage, which needs them on the grid. One kernel for the choice, the
        # norm, the head and both would save 14 H bytes a token in bfloat16: the two tensors chosen and the normalised
        # one are written and read, the sum is written. Of Qwen3-0.6B's shape that is 14 KiB beside the 0.88 GFLOP of
        # its layers, 0.3 % of the time where 790 TFLOP/s and 4.3 TB/s are the limits.
        bias = None if self.score.bias is None else self.score.bias[:, 0]
        return self.ops.ensemble_value(hidden, self.score.weight[:, 0], bias).value

    def seen(self, batch: Batch, micros: Sequence[MicroBatch]) -> tuple[Tensor | None, Sequence[MicroBatch]]:
        """Return what is read in place of tokens, if anything is, and ``micros`` as they are read."""
        return None, micros

    def shares(self, batch: Batch, rows: Sequence[Tensor]) -> bool:
        """Whether the responses among ``rows`` (int64 [b] each) share their prompts: on a CPU, where that saves enough,
        and critics read whole sequences and nothing but tokens."""
        layers: Any = self.layers
        windows = any(layer.self_attn.window is not None for layer in layers if layer.attends)
        if windows or self.varlen is not None or self.policy_inputs or self.read_layers:
            return False
        if batch.tokens.device.type != "cpu":
            return False
        prompts, responses = batch.on_host
        for own in (of_critic.tolist() for of_critic in rows):
            once = {batch.prompt_number[row]: prompts[row] for row in own}
            saved = sum(prompts[row] for row in own) - sum(once.values())
            if saved < WORTH_SHARING * sum(prompts[row] + responses[row] for row in own):
                return False
        return True

    @torch.no_grad()
    def values(self, batch: Batch, max_tokens: int) -> Tensor:
        """See Critics."""
        value = batch.reward.new_zeros(len(self), *batch.reward.shape)
        everything = torch.arange(len(batch), device=batch.tokens.device)
        shared = self.shares(batch, [everything])
        for micro in micro_batches(batch, everything, max(1, max_tokens // len(self)), shared=shared):
            row, position = micro.grid
            if micro.sharing is not None:
                value[:, row, position] = self(micro.input_ids, None, micro.flat_predicts, sharings=[micro.sharing])
                continue
            states, [seen] = self.seen(batch, [micro])
            known = Extent(seen.longest, seen.tokens, seen.tokens)
            read = self.read(batch, seen)
            value[:, row, position] = self(seen.input_ids, seen.attention_mask, seen.flat_predicts, known, read, states)
        release(self)
        return sum_over_ranks(value)

    @torch.no_grad()
    def own_values(self, batch: Batch, shares: Sequence[Tensor], max_tokens: int) -> Tensor:
        """See Critics."""
        value = batch.reward.new_zeros(len(self), *batch.reward.shape)
        for micros in share_micro_batches(batch, shares, max_tokens, shared=self.shares(batch, shares)):
            for critic_value, micro, own in zip(value, micros, self._on_shares(batch, micros), strict=True):
                critic_value[micro.grid] = self.value_of(own)
        release(self)
        return sum_over_ranks(value)

    def backward(self, batch: Batch, shares: Sequence[Tensor], loss: Loss, max_tokens: int) -> Tensor:
        """See Critics."""
        total = torch.zeros(len(self), device=batch.tokens.device)
        pieces = share_micro_batches(batch, shares, max_tokens, shared=self.shares(batch, shares))
        for micros in between_replicas_once(self, pieces):
            parts = torch.stack(
                [loss(*of) for of in zip(range(len(self)), micros, self._on_shares(batch, micros), strict=True)]
            )
            parts.sum().backward()
            total += parts.detach()
        return sum_over_ranks(total)

    def _on_shares(self, batch: Batch, micros: Sequence[MicroBatch]) -> list[Tensor]:
        """What the head of critic m gives [N_m] at the response tokens of its own micro-batch, for all m in one
        pass."""
        pad = nn.utils.rnn.pad_sequence
        sharings = [m.sharing for m in micros if m.sharing is not None]
        if sharings:
            ids = pad([m.input_ids[0] for m in micros], batch_first=True)[:, None]
            positions = pad([m.flat_predicts for m in micros], batch_first=True)
            output = self(ids, None, positions, sharings=sharings, outputs=True)
            return [own[: len(m.flat_predicts)] for own, m in zip(output, micros, strict=True)]
        states, micros = self.seen(batch, micros)
        ids = pad([m.input_ids for m in micros], batch_first=True)
        mask = pad([m.attention_mask for m in micros], batch_first=True)
        # What pads the positions is never read: it may be anything that is there.
        positions = pad([m.flat_predicts for m in micros], batch_first=True)
        tokens = [m.tokens for m in micros]
        read = [own for m in micros if (own := self.read(batch, m)) is not None]
        inputs = pad(read, batch_first=True) if read else None
        extent = Extent(max(m.longest for m in micros), max(tokens), min(tokens))
        output = self(ids, mask, positions, extent, inputs, states, outputs=True)
        return [own[: len(m.flat_predicts)] for own, m in zip(output, micros, strict=True)]

    def collect_gradients(self) -> None:
        """See Critics: the models' gradients are views of the stack's."""
        if self.mesh is not None:
            sum_whole_gradients(self.parameters())
        for name, parameter in self.trained_parameters():
            if parameter.grad is None:
                continue
            for m in range(len(self)):
                module, leaf = self.leaf(m, name)
                getattr(module, leaf).grad = member(parameter.grad, m, self.mesh)

    def release_gradients(self) -> None:
        """See Critics."""
        super().release_gradients()
        for model in self.models:
            model.zero_grad(set_to_none=True)


class StackedCritics(Stacked):
    """M token classifiers of one architecture with one label, the value, that launch what one of them launches.

    ``critics(input_ids, attention_mask)`` gives all values. Parameters have a leading axis M and otherwise the names
    and shapes of transformers; ``models`` are the M models, their weights views of these.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        *,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ):
        """``models`` are taken over: their weights become views of the stack. Forward and backward passes run in
        ``dtype``. Raises ConfigError if the models are of no family that is known here, or differ in shape."""
        super().__init__()
        reason = why_unknown(models[0])
        if reason is not None:
            raise ConfigError(f"critic.stacked: got True, needs False for {type(models[0]).__name__}: {reason}")
        shapes = [{name: p.shape for name, p in model.named_parameters()} for model in models]
        if any(type(model) is not type(models[0]) for model in models) or any(s != shapes[0] for s in shapes):
            raise ConfigError("critic.stacked: got models that differ in class or shape, needs M of one architecture")
        self.loss = loss_of(models)
        self.files = [files_of(model) for model in models]
        self.models = list(models)  # a list, which hides them from nn.Module: the stack has the parameters
        for model in models:
            model.eval()
        self.build(
            [model.base_model for model in models],
            [cast(nn.Linear, model.score) for model in models],
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            inputs=[model.policy_inputs for model in models] if names_of(models) else (),
        )

    @classmethod
    def from_pretrained(
        cls,
        path_or_paths: str | Path | Sequence[str | Path],
        num_critics: int,
        *,
        vocab_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        gradient_checkpointing: bool = False,
    ) -> StackedCritics:
        """Load M critics from one checkpoint, or each from its own; causal language models will do.

        Where a checkpoint has no value head, each critic gets one of its own, drawn from torch's global generator.
        Raises ConfigError if something cannot be loaded or stacked, or has embeddings of fewer than ``vocab_size``
        tokens.
        """
        models = load_value_models(path_or_paths, num_critics, vocab_size=vocab_size, device=torch.device(device))
        return cls(models, dtype=dtype, gradient_checkpointing=gradient_checkpointing)

    def leaf(self, m: int, name: str) -> tuple[nn.Module, str]:
        """See Stacked."""
        path, _, leaf = name.rpartition(".")
        if path in OWN:
            return self.models[m].get_submodule(OWN[path]), leaf
        return self.models[m].base_model.get_submodule(path), leaf

    def save_pretrained(self, directory: str | Path, dtype: SaveDtype = "auto", later: Later | None = None) -> None:
        """Write ``critic_0``, ``critic_1``, …, each for ``AutoModelForTokenClassification``."""
        for m, model in enumerate(self.models):
            save_value_model(model, Path(directory) / f"critic_{m}", dtype, later)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ([n] or [M, n]) of x [M, N, H]."""
    if index.dim() == 1:
        return x.index_select(1, index)
    offset = torch.arange(0, len(x) * x.shape[1], x.shape[1], device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, (index + offset).flatten()).view(*index.shape, x.shape[2])
