"""The public function ``ensemble_gae``: checks, dispatch and registration."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from asyppo_kernels._args import FLOATS, Backend, check_number, check_tensor, choose_backend
from asyppo_kernels._registration import define
from asyppo_kernels.ensemble_gae.result import EnsembleGAE


def ensemble_gae(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float = 1.0,
    backend: Backend = "auto",
) -> EnsembleGAE:
    """Estimate advantages and returns on the mean of M critics (GAE, arXiv 1506.02438; AsyPPO, arXiv 2510.01656).

    With V the mean over critics and t' the next valid step after t, ``delta_t = reward_t + gamma V_t' - V_t`` and
    ``advantage_t = delta_t + gamma lam advantage_t'``; both V and the advantage are 0 after a row's last valid step.
    ``returns`` is V plus the advantage taken with ``value_lam``. For critic m's own return pass ``value[m:m+1]``.

    A masked step is skipped: gamma does not count it, what it holds (NaN included) is not read, and its outputs are 0.
    Valid steps may have holes between them and padding on either side; a row without any comes out 0.

    Args:
        value: [M, B, T] float32, bfloat16 or float16; M >= 1. ``value[:, :, t]`` is the value of the state in which
            token t is chosen, before that token is seen.
        reward: [B, T], in any of these dtypes.
        mask: [B, T] bool, True where the step counts.
        gamma: discount, in [0, 1].
        lam: lambda of the advantage, in [0, 1]; or one for each row, [B] float32, whose values are not checked.
        value_lam: lambda of the returns, in [0, 1]; 1 is the discounted sum of the rewards.
        backend: "torch", "triton" (a GPU's, but for Triton's interpreter), or "auto": Triton on a GPU, torch elsewhere.

    Returns:
        ``EnsembleGAE(advantage, returns, mean, std)``, all [B, T] float32, computed in float32 and detached.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or layout, or a number lies outside [0, 1].
    """
    check_tensor("value", value, shape=(None, None, None), needs="[M, B, T]", dtypes=FLOATS)
    k, b, t = value.shape
    if k == 0:
        raise ValueError(f"value: got shape {list(value.shape)}, needs [M, B, T] with M >= 1")
    check_tensor("reward", reward, shape=(b, t), needs="[B, T] of value", dtypes=FLOATS, device=value.device)
    check_tensor("mask", mask, shape=(b, t), needs="[B, T] of value", dtypes=(torch.bool,), device=value.device)
    row_lam, one_lam = None, cast(float, lam)
    if isinstance(lam, Tensor) and lam.dim() > 0:
        check_tensor("lam", lam, shape=(b,), needs="[B] of value", dtypes=(torch.float32,), device=value.device)
        row_lam, one_lam = lam.detach(), 0.0
    for name, number in (("gamma", gamma), ("lam", one_lam), ("value_lam", value_lam)):
        check_number(name, number, "a number in [0, 1]", low=0.0, high=1.0)
    form = choose_backend("ensemble_gae", backend, value.device, has_triton=True)
    numbers = float(gamma), float(one_lam), float(value_lam)
    return EnsembleGAE(*_op(value.detach(), reward.detach(), mask, *numbers, row_lam, form))


def _form(form: str) -> ModuleType:
    """The module that computes; Triton is imported when it is used, since not every platform has it."""
    return importlib.import_module(f"asyppo_kernels.ensemble_gae.{form}_form")


@define("asyppo::ensemble_gae")
def _op(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    value_lam: float,
    row_lam: Tensor | None = None,
    form: str = "torch",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _form(form).forward(value, reward, mask, gamma, lam, value_lam, row_lam)


@_op.register_fake
def _(
    value: Tensor,
    reward: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    value_lam: float,
    row_lam: Tensor | None = None,
    form: str = "torch",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty() -> Tensor:
        return value.new_empty(mask.shape, dtype=torch.float32)

    return empty(), empty(), empty(), empty()
