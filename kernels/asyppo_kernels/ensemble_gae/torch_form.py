"""``ensemble_gae`` in torch, as a blocked scan: a Python loop over one block's steps, not over T.

With V the mean value and V', z' those of the next valid step (0 after the last), let z = V + lam A. Then

    A = r - V + gamma z'          z = (1 - lam) V + lam r + gamma lam z'

so that one scan of z serves: neither V' nor an index of valid steps is needed. A masked step contributes 0 with
coefficient 1, which carries z across it. The return is A with ``value_lam`` plus V, so V cancels: r + gamma z'.
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
    value = value.float().contiguous().masked_fill(masked, 0)
    reward = reward.float().contiguous().masked_fill(masked, 0)
    mean, std = mean_and_std(value)
    next_z = _next_z(mean, reward, mask, gamma, lam if row_lam is None else row_lam[:, None])
    advantage = (reward - mean).add_(next_z, alpha=gamma).masked_fill_(masked, 0)
    returns = reward.add_(_next_z(mean, reward, mask, gamma, value_lam), alpha=gamma).masked_fill_(masked, 0)
    return advantage, returns, mean, std


def _next_z(mean: Tensor, reward: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> Tensor:
    coefficient = torch.where(mask, gamma * lam, torch.ones_like(mean))
    return _after(_scan(coefficient, torch.lerp(mean, reward, lam)))


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
