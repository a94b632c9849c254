"""``ensemble_gae`` in torch, as blocked scans: a Python loop over one block's steps, not over T.

With V the mean value and V', A' those of the next valid step (0 after the last),

    delta = r + gamma V' - V          A = delta + gamma lam A'

Two scans of one form, z = b + a z': of V, so that differences are formed before anything is added up, and of A.
A masked step contributes 0 with coefficient 1, which carries z across it. A scan of V + lam A would do without the
first, but its rounding is relative to V, not to A.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from asyppo_kernels.ensemble_value.torch_form import mean_and_std

BLOCK = 32


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
    masked = ~mask
    mean, std = mean_and_std(value.float().contiguous().masked_fill(masked, 0))
    next_value = _after(_scan(masked.to(mean.dtype), mean))
    delta = reward.float().add(next_value, alpha=gamma).sub_(mean).masked_fill_(masked, 0)

    def scan(lam: float | Tensor) -> Tensor:
        coefficient = torch.where(mask, gamma * lam, torch.ones_like(mean))
        return _scan(coefficient, delta).masked_fill(masked, 0)

    advantage = scan(lam if row_lam is None else row_lam[:, None])
    same = row_lam is None and lam == value_lam
    returns = (advantage if same else scan(value_lam)) + mean
    return advantage, returns, mean, std


def _after(z: Tensor) -> Tensor:
    """Shift the last dimension by one step: what stands after t, and 0 after the last."""
    return pad(z[..., 1:], (0, 1)) if z.shape[-1] else z


def _scan(a: Tensor, b: Tensor) -> Tensor:
    """Return z with z_t = b_t + a_t z_{t+1} along the last dimension.

    Products of coefficients are formed, never quotients: nothing overflows, and one that underflows is rightly 0.
    """
    steps = b.shape[-1]
    if steps <= 1:
        return b
    blocks = -(-steps // BLOCK)
    fill = blocks * BLOCK - steps
    # [BLOCK, ..., blocks]: the same step of all blocks lies together.
    a = pad(a, (0, fill), value=1.0).unflatten(-1, (blocks, BLOCK)).movedim(-1, 0).contiguous()
    b = pad(b, (0, fill)).unflatten(-1, (blocks, BLOCK)).movedim(-1, 0).contiguous()
    for j in range(BLOCK - 2, -1, -1):
        b[j].addcmul_(a[j], b[j + 1])
        a[j].mul_(a[j + 1])  # from here to the end of the block
    b.addcmul_(a, _after(_scan(a[0], b[0])))
    return b.movedim(0, -1).flatten(-2)[..., :steps]
