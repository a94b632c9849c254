"""The ops that a step of the trainer goes through, in one record, so that others can be handed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import asyppo_kernels
from asyppo_kernels import AgreementMasks, EnsembleGAE, EnsembleValue, LinearLogprob, LinearPPOLoss


@dataclass(frozen=True)
class Ops:
    """By name, functions with the signature and result of ``asyppo_kernels``' op of that name.

    ``Policy.ops`` and ``Critics.ops`` may be set to another record, and ``critics_advantage`` takes one: to compare the
    ops with something else, or to run something else.
    """

    linear_logprob: Callable[..., LinearLogprob] = asyppo_kernels.linear_logprob
    linear_ppo_loss: Callable[..., LinearPPOLoss] = asyppo_kernels.linear_ppo_loss
    ensemble_value: Callable[..., EnsembleValue] = asyppo_kernels.ensemble_value
    ensemble_gae: Callable[..., EnsembleGAE] = asyppo_kernels.ensemble_gae
    agreement_masks: Callable[..., AgreementMasks] = asyppo_kernels.agreement_masks


FUSED = Ops()
"""This project's own."""
