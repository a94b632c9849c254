"""How the sequences of a stacked pass lie in memory, and the attention that knows it.

Every layer but attention sees tokens only, [M, N, ·]. Sequences are packed one behind the other where there is an
attention for that, so that padding costs nothing, and otherwise lie side by side, padded to the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

VarlenAttention = Callable[..., Tensor]
"""``torch.nn.attention.varlen.varlen_attn``, or what has its signature."""


class Layout(Protocol):
    """The tokens of one pass, from ``input_ids`` [K, B, T], where K is M, or 1 if all critics read the same."""

    tokens: Tensor
    """int64 [K, N]."""

    def rotary(self, embedding: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [N, D] or [K, N, D], of ``embedding``, a rotary embedding of transformers, in ``like``'s
        dtype. Positions are columns of ``input_ids``, as transformers counts them."""
        ...

    def index(self, flat: Tensor) -> Tensor:
        """Return where in N the positions ``flat`` (row * T + column) lie; of shape [n] or [K, n], as they are."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Causal attention of [M, N, heads, D], within the last ``window`` positions if not None. Returns
        [M, N, heads * D]."""
        ...


class Padded:
    """Sequences side by side, [K, B * T]."""

    def __init__(self, input_ids: Tensor, attention_mask: Tensor | None):
        """``attention_mask``: bool [K, B, T], or None where causal attention alone keeps padding out of sight: where
        all of it is on the right."""
        self.rows, self.width = input_ids.shape[1:]
        self.tokens = input_ids.flatten(1)
        self.attention_mask = attention_mask
        self.masks: dict[tuple[int, int | None], Tensor] = {}

    def rotary(self, embedding: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """See Layout."""
        cos, sin = embedding(like, torch.arange(self.width, device=like.device)[None])
        return cos[0].repeat(self.rows, 1), sin[0].repeat(self.rows, 1)

    def index(self, flat: Tensor) -> Tensor:
        """See Layout."""
        return flat

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See Layout."""
        q, k, v = (x.reshape(-1, self.width, *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
        if window is not None and window >= self.width:
            window = None
        mask = None
        if self.attention_mask is not None or window is not None:
            mask = self._mask(len(q), window)
        repeat = q.shape[1] // k.shape[1]
        if mask is not None and q.is_cuda and repeat > 1:  # no fused kernel of CUDA takes both
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
            repeat = 1
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=repeat > 1)
        return out.transpose(1, 2).reshape(-1, self.rows * self.width, out.shape[1] * out.shape[3])

    def _mask(self, sequences: int, window: int | None) -> Tensor:
        """bool [1 or M * B, 1, T, T], made once for all layers."""
        if (sequences, window) not in self.masks:
            at = torch.arange(self.width, device=self.tokens.device)
            distance = at[:, None] - at
            mask = distance >= 0
            if window is not None:
                mask &= distance < window
            mask = mask[None]
            if self.attention_mask is not None:
                # A query that is padding sees itself, so that no row of the softmax is empty.
                seen = self.attention_mask.flatten(0, 1)
                seen = seen.repeat(sequences // len(seen), 1)
                mask = (mask & seen[:, None, :]) | (distance == 0)
            self.masks[sequences, window] = mask[:, None]
        return self.masks[sequences, window]


class Packed:
    """Sequences one behind the other, [K, N], N being the most tokens that a critic has; what another lacks is filled
    up by one sequence of padding."""

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, num_critics: int, varlen: VarlenAttention):
        """``attention_mask``: bool [K, B, T]."""
        mask = attention_mask.flatten(1)
        length = attention_mask.sum(2)  # [K, B]
        total = length.sum(1)  # [K]
        # One wait for the host: sizes of what follows.
        self.longest, most, least = torch.stack([length.max(), total.max(), total.min()]).tolist()
        self.longest = max(self.longest, most - least)
        copies = num_critics // len(input_ids)
        # Tokens in front, padding behind; stable, so their order is that of before.
        order = torch.argsort(mask.logical_not(), dim=1, stable=True)[:, :most]
        self.tokens = input_ids.flatten(1).gather(1, order)
        self.positions = order % input_ids.shape[2]
        self.place = (mask.cumsum(1) - 1).clamp(min=0)
        lengths = torch.cat([length, (most - total)[:, None]], dim=1).repeat(copies, 1).flatten()
        self.starts = F.pad(lengths.cumsum(0), (1, 0)).int()
        self.varlen = varlen

    def rotary(self, embedding: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """See Layout."""
        cos, sin = embedding(like, self.positions)
        return (cos[0], sin[0]) if len(cos) == 1 else (cos, sin)

    def index(self, flat: Tensor) -> Tensor:
        """See Layout."""
        return self.place[0][flat] if flat.dim() == 1 else self.place.expand(len(flat), -1).gather(1, flat)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """See Layout."""
        out = self.varlen(
            *(x.flatten(0, 1) for x in (q, k, v)),
            self.starts,
            self.starts,
            self.longest,
            self.longest,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.view(*q.shape[:2], -1)
