"""The conformance kit: `check_estimator` for one's own tests, with models whose answers are known in closed form."""

from estimators.testing import formulas
from estimators.testing.cases import CASES, Case
from estimators.testing.kit import check_estimator
from estimators.testing.outcomes import CheckFailure, ConformanceError, NotApplicable, Outcome, Report
from estimators.testing.registry import CHECKS, check
from estimators.testing.subject import Capabilities, EstimatorCase

__all__ = [
    "CASES",
    "CHECKS",
    "Capabilities",
    "Case",
    "CheckFailure",
    "ConformanceError",
    "EstimatorCase",
    "NotApplicable",
    "Outcome",
    "Report",
    "check",
    "check_estimator",
    "formulas",
]
