"""Which tokens the critics' disagreement admits to the advantage and the entropy term."""

from asyppo_kernels.agreement_masks.op import AgreementMasks, agreement_masks

__all__ = ["AgreementMasks", "agreement_masks"]
