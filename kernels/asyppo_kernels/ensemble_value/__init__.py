"""The critics' value heads with their mean and disagreement."""

from asyppo_kernels.ensemble_value.op import EnsembleValue, ensemble_value

__all__ = ["EnsembleValue", "ensemble_value"]
