"""Passes over packed sequences: several behind each other in one row, which do not see one another.

Attention knows them by position ids that start anew, of which transformers makes a mask, [S, S], or, flash attention,
by their cumulative lengths, as transformers' ``DataCollatorWithFlattening`` gives them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils
from transformers.utils.generic import is_flash_attention_requested

from asyppo.data.batch import Batch, MicroBatch, Packing, make_batch, micro_batch

# Kinds of layers, as configurations call them, that carry nothing from token to token but by attention.
ATTENTION = {"attention", "full_attention", "sliding_attention"}


@contextmanager
def known_sequences(sequence: Tensor | None) -> Iterator[None]:
    """Inside, transformers takes ``sequence`` (int64 [1, S]; None: not packed) for which sequence a token is of, where
    it would compare position ids on the device and let the host wait for the answer."""
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: sequence
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def packed_inputs(model: PreTrainedModel, packing: Packing, longest: int) -> dict[str, Any]:
    """Return what ``model``'s decoder has to be given beside packed tokens, whose longest sequence has so many."""
    inputs: dict[str, Any] = {"position_ids": packing.position_ids}
    if is_flash_attention_requested(model.config):
        inputs |= {f"cu_seq_lens_{x}": packing.starts for x in "qk"}
        inputs |= {f"max_length_{x}": longest for x in "qk"}
    return inputs


def why_not_attention(model: PreTrainedModel) -> str | None:
    """Return which layers of ``model`` carry something from token to token by other means than attention, None if
    there are none."""
    text = model.config.get_text_config()
    kinds = {*(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())} - ATTENTION
    if kinds or getattr(model, "_is_stateful", False):
        return f"{type(model).__name__} has layers other than attention, {', '.join(sorted(kinds)) or 'with a state'}"
    return None


@torch.no_grad()
def why_not_packed(model: PreTrainedModel, logprobs: Callable[[MicroBatch], Any], dtype: torch.dtype) -> str | None:
    """Return why ``model`` cannot read packed sequences, None if it can: if ``logprobs`` of a packed micro-batch are
    those of its sequences one by one, as far as passes in ``dtype`` agree."""
    name, decoder = type(model).__name__, model.get_decoder()
    text = model.config.get_text_config()
    if (others := why_not_attention(model)) is not None:
        return others
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return f"{name} takes no position_ids"
    batch = _sequences(text.vocab_size, model.device)
    rows = range(len(batch))
    alone = torch.cat([logprobs(micro_batch(batch, [row])).logprob for row in rows])
    try:
        packed = logprobs(micro_batch(batch, rows, packed=True)).logprob
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{name} does not take packed sequences ({' '.join(str(error).split())})"
    off = float((packed - alone).abs().mean())
    if not off <= (1e-2 if dtype != torch.float32 else 1e-4 * max(1.0, float(alone.abs().max()) / 10)):
        return f"packed sequences see each other in {name}: log-probs are {off:.2g} off"
    return None


def _sequences(vocab_size: int, device: torch.device) -> Batch:
    """Three sequences of different lengths, the longest first, with prompts of one token."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(vocab_size, (n,), generator=generator) for n in (24, 7, 12)]
    return make_batch(
        [t[:1] for t in tokens],
        [t[1:] for t in tokens],
        [torch.zeros(len(t) - 1) for t in tokens],
        [0.0] * len(tokens),
        [False] * len(tokens),
        [0] * len(tokens),
        pad_token_id=0,
        device=device,
    )
