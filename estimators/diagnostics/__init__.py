"""The pre-flight diagnosis: what is wrong, what misleads, what a fit would cost."""

from estimators.diagnostics.decay import prior_precision_of
from estimators.diagnostics.diagnose import CHECKS, QUICK, diagnose
from estimators.diagnostics.diagnosis import Cost, Diagnosis, Finding

__all__ = ["CHECKS", "QUICK", "Cost", "Diagnosis", "Finding", "diagnose", "prior_precision_of"]
