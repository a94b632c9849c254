"""What the trainer asks of its critics, however they are computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from asyppo.algorithm.ops import FUSED, Ops
from asyppo.data.batch import Batch, MicroBatch
from asyppo.data.padding import PaddingCount
from asyppo.models.hub import Later, SaveDtype

Loss = Callable[[int, MicroBatch, Tensor], Tensor]
"""``loss(m, micro, output)``: from what the head of critic m gives [N] at the response tokens of ``micro`` (values or,
with the loss ``bce``, their logits) to a scalar, which adds up over micro-batches."""


class Critics(nn.Module, ABC):
    """M value models behind one interface.

    ``models`` are M modules, one a critic, that have what is trained, or views of it: what the optimizer steps.
    """

    models: Any
    config: Any
    """The configuration of their architecture."""
    ops: Ops = FUSED
    policy_inputs: tuple[str, ...] = ()
    """What they read beside the tokens, of ``asyppo/models/critics/inputs.py``."""
    read_layers: tuple[int, ...] = ()
    """Layers of the policy, counted from 1, whose hidden states they read in place of tokens; empty: tokens."""
    states_size: int = 0
    """Numbers of these hidden states, of all layers together."""
    loss: str = "mse"
    """What they minimise, ``critic.loss``: with ``bce`` a value is the sigmoid of what the head gives."""
    last_token: int | None = None
    """Where the policy has embeddings of more tokens: the last that critics have one of, which stands for those."""

    def __init__(self) -> None:
        super().__init__()
        self._padding = PaddingCount()

    def __len__(self) -> int:
        return len(self.models)

    def readable(self, input_ids: Tensor) -> Tensor:
        """Return ``input_ids`` with ``last_token`` in place of what lies beyond."""
        return input_ids if self.last_token is None else input_ids.clamp(max=self.last_token)

    def value_of(self, output: Tensor) -> Tensor:
        """Return the values that heads mean by their ``output``."""
        return output.sigmoid() if self.loss == "bce" else output

    def read(self, batch: Batch, micro: MicroBatch) -> Tensor | None:
        """Return what critics read beside the tokens of ``micro``: float32, of the shape of its ``input_ids``, and F;
        None: nothing."""
        if not self.policy_inputs:
            return None
        if batch.policy_inputs is None:
            raise ValueError(
                f"batch.policy_inputs: got None, needs {', '.join(self.policy_inputs)}, which critics read"
            )
        return micro.at_predicting(batch.policy_inputs)

    @abstractmethod
    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the weights over ``mesh`` and put them on its device, layer by layer."""

    @abstractmethod
    def values(self, batch: Batch, max_tokens: int) -> Tensor:
        """Return float32 [M, B, T], the values of all critics for all responses, each read at the position that
        predicts the token; 0 on padding. ``max_tokens`` bounds the tokens of one pass, padding and critics counted."""

    @abstractmethod
    def own_values(self, batch: Batch, shares: Sequence[Tensor], max_tokens: int) -> Tensor:
        """Return float32 [M, B, T], where critic m values the rows ``shares[m]`` (int64 [b_m]) only; 0 elsewhere."""

    @abstractmethod
    def backward(self, batch: Batch, shares: Sequence[Tensor], loss: Loss, max_tokens: int) -> Tensor:
        """Add the gradient of critic m's ``loss`` on the rows ``shares[m]`` to its parameters, for all m, and return
        the losses, float32 [M]."""

    def collect_gradients(self) -> None:
        """Let ``models`` see the gradients of the last ``backward``."""

    def release_gradients(self) -> None:
        """Drop all gradients."""
        self.zero_grad(set_to_none=True)

    def padding_frac(self) -> float:
        """Return the fraction of padding in the tokens of all passes since the last call; 0 if there were none."""
        return self._padding.take()

    @abstractmethod
    def save_pretrained(self, directory: str | Path, dtype: SaveDtype = "auto", later: Later | None = None) -> None:
        """Write one Hugging Face directory a critic: ``critic_0``, ``critic_1``, …; as ``save_model`` does."""
