"""The layers of M transformers of one architecture whose parameters are stacked on a leading axis."""

from asyppo_kernels.stacked_layers.embedding import stacked_embedding
from asyppo_kernels.stacked_layers.qk_norm_rope import stacked_qk_norm_rope
from asyppo_kernels.stacked_layers.rms_norm import StackedRMSNorm, stacked_rms_norm
from asyppo_kernels.stacked_layers.swiglu import stacked_swiglu

__all__ = ["StackedRMSNorm", "stacked_embedding", "stacked_qk_norm_rope", "stacked_rms_norm", "stacked_swiglu"]
