"""Which tokens the critics' disagreement admits to the advantage and the entropy term."""

from asyppo_kernels.agreement_masks.op import agreement_masks
from asyppo_kernels.agreement_masks.result import AgreementMasks

__all__ = ["AgreementMasks", "agreement_masks"]
