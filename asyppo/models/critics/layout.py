"""How the sequences of a stacked pass lie in memory, and the attention that knows it.

Every layer but attention sees tokens only, [M, N, ·]: sequences are packed one behind the other, so that padding is not
computed. Attention reads them as they lie where ``varlen_attn`` runs, and otherwise sees them padded to the longest.
Padding is dropped or moved to the end in any case, so causal attention needs no mask for it. Or sequences share their
prompts: see ``asyppo/models/sharing.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from asyppo.data.sharing import SharedPrompts
from asyppo.models.sharing import by_prompts

VarlenAttention = Callable[..., Tensor]
"""``torch.nn.attention.varlen.varlen_attn``, or what has its signature."""

# Moving tokens in and out of the padded form of attention costs more than computing so little padding.
WORTH_PACKING = 1 / 16


class Extent(NamedTuple):
    """How far the tokens of a pass go, where the host knows."""

    longest: int
    """Tokens of the longest sequence."""
    most: int
    """Tokens of the critic that has most."""
    least: int
    """Tokens of the critic that has fewest."""
    most_runs: int = 1
    """Pieces of the sequence that has most; one without a hole has one."""


class Layout:
    """The tokens of one pass, from ``input_ids`` int64 [K, B, T], where K is M, or 1 if all critics read the same.

    ``attention_mask``, bool [K, B, T], is False on what is left out: padding on the left, the right or both sides,
    and tokens in between, unless a layer has a window, which would have to count them.
    """

    tokens: Tensor
    """int64 [K, N]. Where one critic has fewer than another, padding fills its end."""

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_critics: int,
        varlen: VarlenAttention | None,
        known: Extent | None = None,
    ):
        self.varlen, self.width = varlen, input_ids.shape[2]
        length = attention_mask.sum(2)  # [K, B]
        total = length.sum(1)  # [K]
        if known is None:
            # Of a row with a hole there are two or more.
            runs = (attention_mask & ~F.pad(attention_mask, (1, 0))[..., :-1]).sum(2)
            # The only time the host waits.
            known = Extent(*torch.stack([length.max(), total.max(), total.min(), runs.max()]).tolist())
        self.longest, most, least, self.most_runs = known
        self.sequences = num_critics * input_ids.shape[1]
        grid = input_ids.shape[1] * self.longest
        self.packed = varlen is not None or most < grid * (1 - WORTH_PACKING)
        rank = attention_mask.cumsum(2) - 1  # of each token in its sequence
        row = torch.arange(input_ids.shape[1], device=input_ids.device)[:, None]
        if self.packed:
            # Tokens to the front, in their order.
            order = attention_mask.flatten(1).logical_not().byte().argsort(dim=1, stable=True)[:, :most]
            self.slot = attention_mask.flatten(1).cumsum(1) - 1
        else:
            order = attention_mask.logical_not().byte().argsort(dim=2, stable=True)[:, :, : self.longest]
            order = (order + row * self.width).flatten(1)
            self.slot = (row * self.longest + rank).flatten(1)
        self.slot.clamp_(min=0)
        self.order = order
        self.tokens = input_ids.flatten(1).gather(1, order)
        self.columns = order % self.width
        copies = num_critics // len(input_ids)
        if varlen is not None:
            # What fills a critic up is a sequence of its own.
            lengths = torch.cat([length, (most - total)[:, None]], dim=1).repeat(copies, 1)
            self.starts = F.pad(lengths.flatten().cumsum(0), (1, 0)).int()
            self.longest = max(self.longest, most - least)
            self.asks_for_gqa = "enable_gqa" in signature(varlen).parameters  # torch 2.11 takes all heads as they are
        elif self.packed:
            place = (row * self.longest + rank).flatten(1).gather(1, order).repeat(copies, 1)
            first = torch.arange(0, num_critics * grid, grid, device=place.device)[:, None]
            filler = torch.arange(most, device=place.device) >= total.repeat(copies)[:, None]
            # It goes behind the grid, and takes back what is at the start of its own critic's part: nobody reads it.
            self.into = torch.where(filler, num_critics * grid, place + first).flatten()
            self.back = torch.where(filler, first, place + first).flatten()

    def rotary(self, embedding: Any) -> tuple[Tensor, Tensor]:
        """Return float32 cos and sin, [N, D] or [K, N, D], of ``embedding``, a rotary embedding of transformers.
        Positions are columns of ``input_ids``, as transformers counts them."""
        device = self.columns.device
        like = torch.empty(0, device=device)  # whose dtype the result takes
        cos, sin = embedding(like, torch.arange(self.width, device=device)[None])
        columns = self.columns[0] if len(self.columns) == 1 else self.columns
        return cos[0][columns], sin[0][columns]

    def take(self, beside: Tensor) -> Tensor:
        """Return [K, N, F] of what lies beside ``input_ids``, [K, B, T, F], as the tokens lie."""
        order = self.order[..., None].expand(-1, -1, beside.shape[-1])
        return beside.flatten(1, 2).gather(1, order)

    def index(self, flat: Tensor) -> Tensor:
        """Return where in N the tokens at ``flat`` (row * T + column) lie; of shape [n] or [K, n], as they are."""
        return self.slot[0][flat] if flat.dim() == 1 else self.slot.expand(len(flat), -1).gather(1, flat)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Causal attention of [M, N, heads, D], within the last ``window`` positions if not None. Returns
        [M, N, heads * D]."""
        if window is not None and self.most_runs > 1:
            raise ValueError(
                "attention_mask: got zeros between ones, needs them at the ends of a row only: this layer's attention "
                f"has a window, of {window} positions"
            )
        if self.varlen is not None:
            out = self.varlen(
                *(x.flatten(0, 1) for x in (q, k, v)),
                self.starts,
                self.starts,
                self.longest,
                self.longest,
                window_size=(-1 if window is None else window - 1, 0),
                **({"enable_gqa": q.shape[2] != k.shape[2]} if self.asks_for_gqa else {}),
            )
            return out.view(*q.shape[:2], -1)
        padded = [self._pad(x.flatten(0, 1)).transpose(1, 2) for x in (q, k, v)]
        out = self._sdpa(padded[0], padded[1], padded[2], window)
        out = out.transpose(1, 2).flatten(0, 1).flatten(1)
        return (out.index_select(0, self.back) if self.packed else out).view(*q.shape[:2], -1)

    def _pad(self, x: Tensor) -> Tensor:
        """Tokens [M * N, heads, D] as [M * B, longest, heads, D]."""
        if self.packed:
            grid = x.new_zeros(self.sequences * self.longest + 1, *x.shape[1:])
            x = grid.index_copy_(0, self.into, x)[:-1]
        return x.view(self.sequences, self.longest, *x.shape[1:])

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        mask = None
        if window is not None and window < self.longest:
            at = torch.arange(self.longest, device=q.device)
            distance = at[:, None] - at
            mask = (distance >= 0) & (distance < window)
        repeat = q.shape[1] // k.shape[1]
        if mask is not None and q.is_cuda and repeat > 1:  # no fused kernel of CUDA takes both
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
            repeat = 1
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=repeat > 1)


class SharedLayout(Layout):
    """The tokens of a pass over sequences that share their prompts, as they lie in ``input_ids`` int64 [K, N], where K
    is M, or 1 if all critics read the same; ``sharings`` are K. Padding is at the end."""

    def __init__(self, input_ids: Tensor, sharings: Sequence[SharedPrompts]):
        self.tokens, self.sharings = input_ids, sharings
        positions = [sharing.position_ids[0] for sharing in sharings]
        self.columns = torch.nn.utils.rnn.pad_sequence(positions, batch_first=True)
        self.width = int(self.columns.max()) + 1

    def index(self, flat: Tensor) -> Tensor:
        """See Layout."""
        return flat

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See Layout; without a window."""
        if len(self.sharings) == 1:
            return self._attend(q, k, v, self.sharings[0])
        own = zip(*(x.split(1) for x in (q, k, v)), self.sharings, strict=True)
        return torch.cat([self._attend(*of) for of in own])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, sharing: SharedPrompts) -> Tensor:
        """Critics with the same tokens are more heads."""
        m, padded, heads, d = q.shape
        n, gqa = sharing.position_ids.shape[1], heads != k.shape[2]

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa)
            return out.transpose(1, 2)

        by_head = [x[:, :n].transpose(1, 2).reshape(1, -1, n, d) for x in (q, k, v)]
        out = by_prompts(attend, by_head[0], by_head[1], by_head[2], sharing)
        return F.pad(out.view(n, m, heads * d).transpose(0, 1), (0, 0, 0, padded - n))
