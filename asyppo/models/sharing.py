"""Passes over sequences that share their prompts: each prompt is computed once, for all responses to it.

Linear layers see every token of the row and no padding. Attention goes prompt by prompt: the prompt's tokens look at
themselves, those of a response at the prompt's keys and its own. As in Prefix Grouper (arXiv 2506.05433), gradients are
those of sequences that each have their prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from asyppo.data.batch import MicroBatch, make_batch, micro_batch
from asyppo.data.sharing import SharedPrompt, SharedPrompts
from asyppo.models.packing import why_not_attention

SHARED = "shared_prompts"
"""What a decoder's pass hands on to attention."""
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention [b, T, heads, D] of query, key and value [b, heads, T, D], by a mask, or, without one, a causal one."""
OTHER_ATTENTION = ("sliding_window", "softcap", "position_bias", "s_aux", "cache")


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prompts: SharedPrompts | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa``, [1, S, heads, D] of query, key and value [1, heads, S, D], where prompts are shared."""
    if shared_prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    refused = [name for name in OTHER_ATTENTION if options.get(name) is not None]
    if refused:
        raise ValueError(f"attention with {', '.join(refused)} does not take shared prompts")

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa_attention_forward(module, q, k, v, mask, **options)[0]

    return by_prompts(attend, query, key, value, shared_prompts), None


AttentionInterface.register("sdpa", attention)


def by_prompts(attend: Attend, query: Tensor, key: Tensor, value: Tensor, shared_prompts: SharedPrompts) -> Tensor:
    """Return [1, S, heads, D] of query, key and value [1, heads, S, D]."""
    outputs = []
    # Gradients of pieces that are split are put together; each that is cut out would be added to zeros elsewhere.
    sizes = [size for part in shared_prompts.parts for size in (part.length, part.end - part.middle)]
    pieces = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    for part, own, responses in zip(shared_prompts.parts, pieces, pieces, strict=True):
        outputs.append(attend(own[0], own[1], own[2], None))
        if part.end > part.middle:
            grids = [_grid(x, part) for x in responses]
            q, k, v = grids[0], *(_behind(*of) for of in zip(own[1:], grids[1:], strict=True))
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(part.length)
            outputs.append(_row(attend(q, k, v, seen[None, None]), part))
    return torch.cat(outputs, dim=1)


def _grid(x: Tensor, part: SharedPrompt) -> Tensor:
    """[G, heads, T, D], padded on the right, of the responses' [1, heads, n, D]."""
    tokens = x[0].transpose(0, 1)
    if part.grid is not None:
        tokens = tokens.index_select(0, part.grid.to(x.device))
    return tokens.unflatten(0, (len(part.responses), -1)).transpose(1, 2)


def _behind(prompt: Tensor, responses: Tensor) -> Tensor:
    """[G, heads, P + T, D]: the prompt's [1, heads, P, D] before those of each response."""
    return torch.cat([prompt.expand(len(responses), -1, -1, -1), responses], dim=2)


def _row(grid: Tensor, part: SharedPrompt) -> Tensor:
    """[1, n, heads, D] of [G, T, heads, D]."""
    tokens = grid.flatten(0, 1)
    return (tokens if part.grid is None else tokens.index_select(0, part.places.to(grid.device)))[None]


@torch.no_grad()
def why_not_shared(model: PreTrainedModel, logprobs: Callable[[MicroBatch], Any], dtype: torch.dtype) -> str | None:
    """Return why sequences of ``model`` cannot share their prompts, None if they can: if ``logprobs`` of a micro-batch
    in which they do are those of the padded one, as far as passes in ``dtype`` agree."""
    name, text = type(model).__name__, model.config.get_text_config()
    if text._attn_implementation != "sdpa":
        return f"the attention of {name} is {text._attn_implementation}"
    if (others := why_not_attention(model)) is not None:
        return others
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(text.vocab_size, (length,), generator=generator) for length in (3, 2)]
    responses = [torch.randint(text.vocab_size, (length,), generator=generator) for length in (4, 2, 3)]
    batch = make_batch(
        [prompts[0], prompts[0], prompts[1]],
        responses,
        [torch.zeros(len(tokens)) for tokens in responses],
        [0.0] * 3,
        [False] * 3,
        [0, 0, 1],
        pad_token_id=0,
        device=model.device,
    )
    padded = logprobs(micro_batch(batch, range(3))).logprob
    try:
        shared = logprobs(micro_batch(batch, range(3), shared=True)).logprob
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{name} does not take shared prompts ({' '.join(str(error).split())})"
    off = float((shared - padded).abs().mean())
    if not off <= (1e-2 if dtype != torch.float32 else 1e-4 * max(1.0, float(padded.abs().max()) / 10)):
        return f"log-probs of responses that share a prompt in {name} are {off:.2g} off"
    return None
