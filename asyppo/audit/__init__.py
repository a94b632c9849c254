"""What a run's critics and estimators are worth: values against the truth, gradients against a reference."""

from asyppo.audit.gradients import GradientAudit, audit_gradients
from asyppo.audit.values import ValueAudit, audit_values

__all__ = ["GradientAudit", "ValueAudit", "audit_gradients", "audit_values"]
