"""Log-prob and entropy of a policy head."""

from asyppo_kernels.linear_logprob.op import linear_logprob
from asyppo_kernels.linear_logprob.reference import linear_logprob_reference
from asyppo_kernels.linear_logprob.result import LinearLogprob

__all__ = ["LinearLogprob", "linear_logprob", "linear_logprob_reference"]
