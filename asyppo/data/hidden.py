"""The policy's hidden states that critics read: kept from one pass over the batch, or made again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from asyppo.data.batch import Batch, MicroBatch, empty_micro_batch
from asyppo.distributed.processes import sum_over_ranks


class HiddenStates:
    """Hidden states [D] of a policy at the positions that predict the response tokens of ``batch``.

    They are kept, whole on every rank, where they take at most ``max_bytes``: a pass over the batch has to ``add`` them
    then, and to ``finish``. Otherwise ``make`` makes those of a micro-batch, [N, D], whenever they are read.
    """

    def __init__(
        self,
        batch: Batch,
        layers: Sequence[int],
        size: int,
        dtype: torch.dtype,
        make: Callable[[MicroBatch], Tensor],
        max_bytes: int,
    ):
        """``size`` is D, of the policy's ``layers`` together."""
        self.layers, self._make, self._length = tuple(layers), make, batch.response_length
        self._none = empty_micro_batch(batch)
        self._first = self._length.cumsum(0) - self._length
        tokens = sum(batch.on_host[1])
        self._kept: Tensor | None = None
        if tokens * size * dtype.itemsize <= max_bytes:
            self._kept = torch.zeros(tokens, size, dtype=dtype, device=batch.tokens.device)
        self._complete = self._kept is None

    @property
    def are_kept(self) -> bool:
        """Whether a pass over the batch has to add them."""
        return self._kept is not None

    def add(self, micro: MicroBatch, states: Tensor) -> None:
        """Keep the ``states`` [N, D] of the response tokens of ``micro``."""
        assert self._kept is not None
        row, position = micro.grid
        self._kept[self._first[row] + position] = states

    def finish(self) -> None:
        """End the pass: every rank has what any of them has added."""
        assert self._kept is not None
        self._kept = sum_over_ranks(self._kept, in_place=True)
        self._complete = True

    def of(self, micros: Sequence[MicroBatch]) -> tuple[Tensor, list[MicroBatch]]:
        """Return states, [S, D], and ``micros`` as seen by who reads these: on the response grid, padded to one width,
        their ``input_ids`` the rows of S."""
        if not self._complete:
            raise RuntimeError("hidden states are read before the pass that keeps them has ended")
        if self._kept is not None:
            table, firsts = self._kept, [self._first[micro.rows] for micro in micros]
        else:
            # On every rank the policy runs as often as on the others.
            table = torch.cat([self._make(micro if len(micro.rows) else self._none) for micro in micros])
            firsts, start = [], 0
            for micro in micros:
                length = self._length[micro.rows]
                firsts.append(length.cumsum(0) - length + start)
                start += len(micro.response)
            if not len(table):  # only padding is read, and it has to be something
                table = table.new_zeros(1, table.shape[1])
        width = max(micro.longest_response for micro in micros)
        return table, [self._seen(*of, len(table), width) for of in zip(micros, firsts, strict=True)]

    def _seen(self, micro: MicroBatch, first: Tensor, count: int, width: int) -> MicroBatch:
        if not len(micro.rows):
            return replace(micro, input_ids=micro.input_ids.new_zeros(len(micro.input_ids), width))
        places = first[:, None] + torch.arange(width, device=first.device)
        return replace(
            micro,
            input_ids=places.clamp_(max=count - 1),
            length=self._length[micro.rows],
            predicts=(micro.response, micro.grid[1]),
            tokens=len(micro.response),
            longest=micro.longest_response,
            packing=None,
        )
