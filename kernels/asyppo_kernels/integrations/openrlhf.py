"""OpenRLHF 0.11: advantages and returns from the op; its head hands out whole logits, which nothing here can save."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from asyppo_kernels.ensemble_gae import ensemble_gae
from asyppo_kernels.integrations._patching import Patches, check_version

TESTED = "0.11"

_patches = Patches()


def enable() -> None:
    """Put ``ensemble_gae`` in ``RemoteExperienceMaker.get_advantages_and_returns``; a second call changes nothing.

    Raises:
        ImportError: unless OpenRLHF 0.11 is installed.
    """
    check_version("openrlhf", TESTED)
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    if not _patches:
        _patches.replace(RemoteExperienceMaker, "get_advantages_and_returns", _get_advantages_and_returns)


def disable() -> None:
    """Give OpenRLHF its own method back."""
    _patches.undo()


def _get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    return advantages_and_returns(values, rewards, action_mask, gamma, lambd)


def advantages_and_returns(
    values: Tensor, rewards: Tensor, mask: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of ``values``, ``rewards`` and ``mask`` [B, T]: float32, 0 where masked.

    A masked step between steps of the response is skipped. OpenRLHF's own method takes it for a step of value 0.
    """
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    out = ensemble_gae(values[None], rewards, mask, gamma=float(gamma), lam=float(lam), value_lam=float(lam))
    return out.advantage, out.returns
