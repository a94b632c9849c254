"""The critics' value heads with their mean and disagreement."""

from asyppo_kernels.ensemble_value.op import ensemble_value
from asyppo_kernels.ensemble_value.result import EnsembleValue

__all__ = ["EnsembleValue", "ensemble_value"]
