"""Pre-flight diagnostics: errors, misleading numbers and the cost of every method, before a fit."""

from estimators.diagnostics.diagnose import CHECKS, QUICK, diagnose
from estimators.diagnostics.diagnosis import Diagnosis
from estimators.diagnostics.findings import Cost, Finding
from estimators.diagnostics.weight_decay import prior_precision_of

__all__ = ["CHECKS", "QUICK", "Cost", "Diagnosis", "Finding", "diagnose", "prior_precision_of"]
