"""What the loss reads of its rows, cleared of all that does not count, and the chunks in which they are computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from asyppo_kernels._policy_head import IGNORE_TARGET, even_size, row_spans


class PPOOptions(NamedTuple):
    """The numbers of the loss."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    entropy_coef: float
    kl_coef: float
    kl_bias_correction: bool


class RowInputs(NamedTuple):
    """The numbers of each row, [n], as they were given: any float dtype, any strides; masks are bool."""

    target: Tensor
    old_logprob: Tensor | None
    advantage: Tensor
    token_weight: Tensor
    advantage_keep: Tensor | None
    entropy_keep: Tensor | None
    ref_logprob: Tensor | None
    rollout_weight: Tensor | None


class Rows(NamedTuple):
    """What the loss reads of each row, [n], cleared to 0 or False where it does not count."""

    target: Tensor
    old_logprob: Tensor | None  # None: the row's own
    ref_logprob: Tensor
    advantage: Tensor
    rollout_weight: Tensor
    token_weight: Tensor
    counted: Tensor  # token_weight != 0 and a target
    surrogate_on: Tensor  # the surrogate moves the loss: keepA and A u != 0
    entropy_on: Tensor  # the entropy moves the loss
    live: Tensor  # anything moves the loss

    def take(self, index: Tensor | slice) -> Rows:
        """The rows of ``index``."""
        return self._replace(**{name: x[index] for name, x in self._asdict().items() if x is not None})


def read_rows(given: RowInputs, ppo: PPOOptions) -> Rows:
    """Clear whatever does not count, so that nothing after this meets a NaN that was not to be read."""
    target, old_logprob, advantage, token_weight, advantage_keep, entropy_keep, ref_logprob, rollout_weight = given
    token_weight = token_weight.float()
    counted = (token_weight != 0) & (target != IGNORE_TARGET)
    advantage_on = counted if advantage_keep is None else counted & advantage_keep
    advantage = advantage.float().where(advantage_on, 0.0)
    if rollout_weight is None:
        rollout_weight = torch.ones_like(token_weight)
    rollout_weight = rollout_weight.float().where(advantage_on, 0.0)
    surrogate_on = advantage * rollout_weight != 0

    if ppo.entropy_coef == 0:
        entropy_on = torch.zeros_like(counted)
    else:
        entropy_on = counted if entropy_keep is None else counted & entropy_keep
    if ref_logprob is None or ppo.kl_coef == 0:
        ref_logprob = torch.zeros_like(token_weight)
    return Rows(
        target=target.where(counted, 0),
        old_logprob=None if old_logprob is None else old_logprob.float().where(counted, 0.0),
        ref_logprob=ref_logprob.float().where(counted, 0.0),
        advantage=advantage,
        rollout_weight=rollout_weight,
        token_weight=token_weight.where(counted, 0.0),
        counted=counted,
        surrogate_on=surrogate_on,
        entropy_on=entropy_on,
        live=counted if ppo.kl_coef != 0 else surrogate_on | entropy_on,
    )


def live_and_dead(rows: Rows) -> tuple[Tensor, Tensor]:
    """The rows with which the loss can move, and those that only count, in order; at the cost of one host sync."""
    dead = rows.counted & ~rows.live
    order = torch.where(rows.live, 0, torch.where(dead, 1, 2)).argsort(stable=True)
    n_live, n_dead = torch.stack([rows.live.sum(), dead.sum()]).tolist()
    return order[:n_live], order[n_live : n_live + n_dead]


def chunks(
    n: int, limit: int, compacted: tuple[Tensor, Tensor] | None, *, dead_row_stats: bool
) -> Iterator[tuple[Tensor | slice, bool]]:
    """Yield (rows of a chunk, whether gradients can differ from 0 there) of ``live_and_dead``; None: of all rows."""
    if compacted is None:
        even = even_size(n, limit)
        yield from ((slice(start, min(start + even, n)), True) for start in range(0, n, even))
        return
    live, dead = compacted
    yield from ((index, True) for index in row_spans(live, n, limit))
    if dead_row_stats:
        yield from ((index, False) for index in row_spans(dead, n, limit))
