"""Generalised advantage estimation on the mean of the critics."""

from asyppo_kernels.ensemble_gae.op import EnsembleGAE, ensemble_gae

__all__ = ["EnsembleGAE", "ensemble_gae"]
