"""Fused ops for reinforcement learning of language models with critics; they need torch and triton only."""

from asyppo_kernels.agreement_masks import AgreementMasks, agreement_masks
from asyppo_kernels.ensemble_gae import EnsembleGAE, ensemble_gae
from asyppo_kernels.ensemble_value import EnsembleValue, ensemble_value

__all__ = [
    "AgreementMasks",
    "EnsembleGAE",
    "EnsembleValue",
    "agreement_masks",
    "ensemble_gae",
    "ensemble_value",
]
