"""Drawing tokens from logits."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # tokens
NOT_FINITE = "the model's logits are not finite: there is nothing to draw from"


def draw(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of ``logits`` [b, V], tempered, and return it, int64 [b], and its log-prob,
    float32 [b].

    By the inverse of the cumulative distribution, with sums and uniforms in float64: those of float32 would coarsen
    whatever is less likely than 2^-24. A token of probability 0 is never drawn. At temperature 0 it is the likeliest
    token, the first of equals, and its log-prob is 0. Raises RuntimeError where a row is no
    distribution (NaN or +inf).
    """
    if temperature == 0:
        most, token = logits.max(dim=1)
        if not bool(most.isfinite().all()):
            raise RuntimeError(NOT_FINITE)
        return token, torch.zeros_like(most, dtype=torch.float32)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device)
    drawn = []
    # Some rows at a time: sums of all of them would take twice the memory of the logits, and fit in no CPU's cache.
    rows = max(1, (2**24 if logits.is_cuda else 2**18) // logits.shape[1])
    for part, share in zip(logits.split(rows), uniform.split(rows), strict=True):
        scores = tempered(part, temperature)
        scores = scores - scores.amax(dim=1, keepdim=True)
        # First a block of tokens, then one of them: running sums of all tokens would take most of the time.
        likelihood = scores.new_zeros(len(part), -(-part.shape[1] // BLOCK) * BLOCK)
        torch.exp(scores, out=likelihood[:, : part.shape[1]])
        blocks = likelihood.unflatten(1, (-1, BLOCK))
        cumulative = blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
        total = cumulative[:, -1:].contiguous()
        at = share * total
        block = inverse(cumulative, at)
        at = at - torch.nn.functional.pad(cumulative, (1, 0)).gather(1, block)
        within = blocks.take_along_dim(block[..., None], dim=1)[:, 0].cumsum(dim=1, dtype=torch.float64)
        token = (block * BLOCK + inverse(within, at)).clamp(max=part.shape[1] - 1)  # of NaN: past the end
        drawn.append((token, scores.gather(1, token) - total.log(), total))
    token, logprob, total = (torch.cat(part)[:, 0] for part in zip(*drawn, strict=True))
    if not bool(total.isfinite().all()):
        raise RuntimeError(NOT_FINITE)
    return token, logprob.float()


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Return ``logits`` [b, V] of the tempered distribution, float32; at temperature 0 all of it is on the likeliest
    token."""
    if temperature > 0:
        return logits.float() if temperature == 1 else logits.float() / temperature
    likeliest = logits.argmax(dim=1, keepdim=True)
    return torch.full_like(logits, -torch.inf, dtype=torch.float32).scatter(1, likeliest, 0.0)


def inverse(cumulative: Tensor, at: Tensor) -> Tensor:
    """Return for each row the first index where ``cumulative`` [b, V] is above ``at`` [b, 1], int64 [b, 1]; the last
    one of a probability that is not 0 where rounding has put ``at`` at the very total."""
    total = cumulative[:, -1:].contiguous()
    last = torch.searchsorted(cumulative, total).clamp(max=cumulative.shape[1] - 1)  # of NaN: past the end
    return torch.searchsorted(cumulative, at.contiguous(), right=True).minimum(last)
