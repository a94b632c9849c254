"""Fused ops for reinforcement learning of language models with critics; they need torch and triton only."""

from asyppo_kernels.agreement_masks import AgreementMasks, agreement_masks
from asyppo_kernels.ensemble_gae import EnsembleGAE, ensemble_gae
from asyppo_kernels.ensemble_value import EnsembleValue, ensemble_value
from asyppo_kernels.linear_logprob import LinearLogprob, linear_logprob
from asyppo_kernels.linear_ppo_loss import LinearPPOLoss, linear_ppo_loss
from asyppo_kernels.stacked_layers import (
    StackedRMSNorm,
    stacked_embedding,
    stacked_qk_norm_rope,
    stacked_rms_norm,
    stacked_swiglu,
)

__version__ = "0.1.0"  # of the distribution asyppo, which pyproject.toml reads here

__all__ = [
    "AgreementMasks",
    "EnsembleGAE",
    "EnsembleValue",
    "LinearLogprob",
    "LinearPPOLoss",
    "StackedRMSNorm",
    "agreement_masks",
    "ensemble_gae",
    "ensemble_value",
    "linear_logprob",
    "linear_ppo_loss",
    "stacked_embedding",
    "stacked_qk_norm_rope",
    "stacked_rms_norm",
    "stacked_swiglu",
]
