"""``ensemble_gae`` in torch: on a CPU with running sums, a few dozen calls whatever T.

With V the mean value and V', A' those of the next valid step (0 after the last),

    delta = r + gamma V' - V          A = delta + gamma lam A'

Differences are formed before anything is added up: a sum of V + lam A would be rounded relative to V, not to A. Valid
steps that do not stand side by side are moved together first, so that no step is skipped after that. Then A is, with
c = gamma lam, c^-t times the sum of c^i delta_i over i >= t: torch's running sum from the right, in float64, whose
range holds the weights of thousands of steps and whose rounding leaves no trace. Where it does not hold them, where
each row has its own lambda, and on other devices, A is a blocked scan.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from asyppo_kernels.ensemble_value.torch_form import mean_and_std

BLOCK = 32
SMALLEST = 1e-250  # of the weights c^i: times any float32, and divided into one, a normal float64


def forward(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    value_lam: float,
    row_lam: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return advantage, returns, mean and std, all [B, T] float32."""
    mask = (mask.view(torch.uint8) != 0).contiguous()  # a byte other than 0 is True, whatever it holds
    bits = mask.int().neg_()  # all or none
    mean, std = (_kept(x, bits) for x in mean_and_std(value.float().contiguous()))
    v, r = mean, _kept(reward.float().contiguous(), bits)
    place = None
    if mask.device.type != "cpu" or _has_holes(mask):  # only a CPU is asked, since any other would be waited for
        place = mask.cumsum(1) & bits
        v, r = _together(v, place), _together(r, place)
    delta = r.add(_after(v), alpha=gamma).sub_(v)

    def scan(decay: float | Tensor) -> Tensor:
        z = _scan(decay, delta)
        return _kept(z if place is None else z.gather(1, place), bits)

    advantage = scan(gamma * (lam if row_lam is None else row_lam[:, None]))
    same = row_lam is None and lam == value_lam
    returns = (advantage if same else scan(gamma * value_lam)) + mean
    return advantage, returns, mean, std


def _kept(x: Tensor, bits: Tensor) -> Tensor:
    """x where the step counts, 0 elsewhere, NaN or not."""
    return (x.view(torch.int32) & bits).view(torch.float32)


def _has_holes(mask: Tensor) -> bool:
    """Whether the valid steps of some row do not stand side by side."""
    starts = (mask[:, 1:] > mask[:, :-1]).sum(1, dtype=torch.int32) + mask[:, :1].sum(1, dtype=torch.int32)
    return bool((starts > 1).any())


def _together(x: Tensor, place: Tensor) -> Tensor:
    """Move each row's valid steps to the places 1, 2, ... of [B, T + 1], and the others, all of them 0, to place 0."""
    return x.new_zeros(x.shape[0], x.shape[1] + 1).scatter_(1, place, x)


def _after(z: Tensor) -> Tensor:
    """Shift the last dimension by one step: what stands after t, and 0 after the last."""
    return pad(z[..., 1:], (0, 1)) if z.shape[-1] else z


def _scan(a: float | Tensor, b: Tensor) -> Tensor:
    """Return z with z_t = b_t + a z_{t+1} along the last dimension; a is a number, or [B, 1] of b's rows."""
    if isinstance(a, Tensor):
        return _scan_blocks(a, b)
    steps, rounded = b.shape[1], b.new_full((1, 1), a)  # float32 as in a loop: delta has gamma rounded, too
    if b.device.type != "cpu" or (c := float(rounded)) ** steps < SMALLEST:
        return _scan_blocks(rounded, b)
    if c == 1:
        return b.flip(1).cumsum_(1).flip(1)
    weight = torch.full((), c, dtype=torch.float64) ** -torch.arange(steps, dtype=torch.float64)
    return b.flip(1).double().mul_(weight).cumsum_(1).div_(weight).float().flip(1)


def _scan_blocks(a: Tensor, b: Tensor) -> Tensor:
    """The same by a Python loop over one block's steps.

    Products of coefficients are formed, never quotients: nothing overflows, and one that underflows is rightly 0.
    """
    steps = b.shape[-1]
    if steps <= 1:
        return b
    blocks = -(-steps // BLOCK)
    # [BLOCK, B, blocks]: the same step of all blocks lies together.
    z = pad(b, (0, blocks * BLOCK - steps)).unflatten(-1, (blocks, BLOCK)).movedim(-1, 0).contiguous()
    for j in range(BLOCK - 2, -1, -1):
        z[j].addcmul_(a, z[j + 1])
    left = torch.arange(BLOCK, 0, -1, device=b.device)[:, None, None]  # steps to the end of the block
    z.addcmul_(a**left, _after(_scan_blocks(a**BLOCK, z[0])))
    return z.movedim(0, -1).flatten(-2)[..., :steps]
