"""The conformance kit: `check_estimator` tests an estimator on models with a known closed form."""

from estimators.testing import formulas
from estimators.testing.cases import CASES, Case
from estimators.testing.estimator_under_test import Capabilities, EstimatorUnderTest
from estimators.testing.kit import check_estimator
from estimators.testing.outcomes import CheckFailure, ConformanceError, NotApplicable, Outcome, Report
from estimators.testing.registry import CHECKS, check

__all__ = [
    "CASES",
    "CHECKS",
    "Capabilities",
    "Case",
    "CheckFailure",
    "ConformanceError",
    "EstimatorUnderTest",
    "NotApplicable",
    "Outcome",
    "Report",
    "check",
    "check_estimator",
    "formulas",
]
