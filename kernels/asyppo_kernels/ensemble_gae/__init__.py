"""Generalised advantage estimation on the mean of the critics."""

from asyppo_kernels.ensemble_gae.op import ensemble_gae
from asyppo_kernels.ensemble_gae.result import EnsembleGAE

__all__ = ["EnsembleGAE", "ensemble_gae"]
