"""The pre-flight diagnosis: what is wrong, what misleads, what a fit would cost."""

from estimators.diagnostics.diagnose import CHECKS, QUICK, diagnose
from estimators.diagnostics.diagnosis import Diagnosis
from estimators.diagnostics.findings import Cost, Finding
from estimators.diagnostics.weight_decay import prior_precision_of

__all__ = ["CHECKS", "QUICK", "Cost", "Diagnosis", "Finding", "diagnose", "prior_precision_of"]
