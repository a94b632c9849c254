"""AdamW, with moments in float32 or in 8 bits."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from asyppo.distributed.sharding import local

Optim = Literal["adamw", "adamw_8bit"]

BLOCK = 256
"""Numbers of a moment that share a scale: what bitsandbytes' kernels are made for."""
SMALLEST = 4096
"""Numbers of a tensor from which its moments are kept in 8 bits; bitsandbytes' own threshold."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(
    parameters: list[nn.Parameter] | list[dict[str, Any]],
    optim: Optim,
    *,
    learning_rate: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """Return what steps ``parameters``, float32, sharded or not, or groups of them as torch's optimizers take them;
    ``adamw_8bit`` needs bitsandbytes."""
    kind = AdamW8bit if optim == "adamw_8bit" else torch.optim.AdamW
    return kind(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def optimizer_bytes_per_parameter(optim: Optim) -> float:
    """Return the bytes of both moments of one number that is trained, in a tensor of ``SMALLEST`` or more."""
    return 2 * (1 + 4 / BLOCK) if optim == "adamw_8bit" else 8.0


def new_state(optimizer: torch.optim.AdamW, p: nn.Parameter) -> dict[str, Any]:
    """Return the state of ``p`` in ``optimizer`` before its first step."""
    if isinstance(optimizer, AdamW8bit) and optimizer.quantizes(p):
        return optimizer.quantized_state(p)
    moments = {name: torch.zeros_like(p, requires_grad=False) for name in MOMENTS}
    return {"step": torch.zeros((), device=p.device), **moments}


class AdamW8bit(torch.optim.AdamW):
    """AdamW whose moments are kept in 8 bits (arXiv 2110.02861), by bitsandbytes' kernels: each block of ``BLOCK``
    numbers, as they lie in memory, has a float32 scale, and of each number the nearest of 256 fractions of it is kept.
    They are widened for the step, which is made in float32. Tensors of fewer than ``SMALLEST`` numbers keep float32
    moments, and torch steps them.

    Of a sharded tensor each rank's piece has blocks of its own. State is plain tensors: ``exp_avg`` and ``exp_avg_sq``,
    uint8, of the parameter's shape and sharding, and ``exp_avg_scale`` and ``exp_avg_sq_scale``, float32, of one number
    a block. Where the pieces are whole blocks of the tensor, one behind the other, the latter have shape [blocks], on
    any number of ranks; otherwise [ranks, blocks], which other numbers of ranks cannot take over.
    """

    def __init__(self, params: list[nn.Parameter] | list[dict[str, Any]], **options: Any):
        """``options`` go to torch's AdamW."""
        super().__init__(params, **options)
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def quantizes(p: Tensor) -> bool:
        """Whether the moments of ``p`` are kept in 8 bits; that does not depend on how it is sharded."""
        return p.numel() >= SMALLEST

    @staticmethod
    def quantized_state(p: Tensor) -> dict[str, Any]:
        """Return the state of ``p`` before its first step."""
        state: dict[str, Any] = {"step": torch.zeros(())}  # on the host, where the kernels take it from
        for name in MOMENTS:
            state[name] = torch.zeros_like(p, dtype=torch.uint8, requires_grad=False)
            state[f"{name}_scale"] = _new_scale(p)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """As torch's, without a closure."""
        stepped: list[tuple[nn.Parameter, Tensor]] = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and self.quantizes(p):
                    if not self.state[p]:
                        self.state[p] = self.quantized_state(p)
                    self._step(p, p.grad, self.state[p], group)
                    stepped.append((p, p.grad))
        for p, _ in stepped:
            p.grad = None
        super().step()
        for p, grad in stepped:
            p.grad = grad

    def _step(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        state["step"] += 1
        weight, gradient = local(p.detach()), local(grad).contiguous()
        if not weight.numel():  # a rank may have nothing of a tensor with few rows
            return
        signed, unsigned = self._maps_on(weight.device)
        blocks = -(-weight.numel() // BLOCK)
        (first, second), (scale, scale_sq) = (
            [local(state[f"{name}{end}"]) for name in MOMENTS] for end in ("", "_scale")
        )
        optimizer_update_8bit_blockwise(
            "adam",
            gradient,
            weight,
            first,
            second,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            beta3=0.0,
            alpha=0.0,
            eps=group["eps"],
            step=int(state["step"]),
            lr=group["lr"],
            qmap1=signed,
            qmap2=unsigned,
            absmax1=scale.view(-1)[:blocks],
            absmax2=scale_sq.view(-1)[:blocks],
            weight_decay=group["weight_decay"],
        )

    def _maps_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The 256 fractions that the codes of each moment stand for."""
        if device not in self._maps:
            from bitsandbytes.functional import create_dynamic_map

            self._maps[device] = create_dynamic_map(signed=True).to(device), create_dynamic_map(signed=False).to(device)
        return self._maps[device]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would make float32 of codes."""
        state: dict[Any, dict[str, Any]] = {}
        codes: dict[Any, dict[str, Tensor]] = {}
        for key, own in state_dict["state"].items():
            is_code = {name: isinstance(v, Tensor) and v.dtype == torch.uint8 for name, v in own.items()}
            state[key] = {name: v for name, v in own.items() if not is_code[name]}
            codes[key] = {name: v for name, v in own.items() if is_code[name]}
        super().load_state_dict(state_dict | {"state": state})
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(saved, parameters, strict=True):
            if own := codes.get(key):
                loaded = {name: code.to(p.device) for name, code in own.items()}
                self.state[p] |= loaded | {"step": self.state[p]["step"].cpu()}


def _new_scale(p: Tensor) -> Tensor:
    """The scales of a moment of ``p`` that is 0: see ``AdamW8bit``."""
    own = torch.zeros(-(-local(p).numel() // BLOCK), device=p.device)
    if not isinstance(p, DTensor):
        return own
    mesh, placements = p.device_mesh, p.placements
    cut = next(((i, place.dim) for i, place in enumerate(placements) if isinstance(place, Shard)), None)
    if cut is None:
        return DTensor.from_local(own, mesh, placements, run_check=False)
    axis, dim = cut
    ranks, rows = mesh.size(axis), p.shape[dim]
    longest = -(-rows // ranks) * (p.numel() // rows)
    blocks = -(-longest // BLOCK)
    in_line = ranks == 1 or (dim == 0 and rows % ranks == 0 and longest % BLOCK == 0)
    shape = (ranks * blocks,) if in_line else (ranks, blocks)
    own = torch.zeros(math.prod(shape) // ranks, device=p.device).view(-1 if in_line else (1, blocks))
    kept = [Shard(0) if i == axis else Replicate() for i in range(mesh.ndim)]
    stride = (1,) if in_line else (blocks, 1)
    return DTensor.from_local(own, mesh, kept, run_check=False, shape=torch.Size(shape), stride=stride)
