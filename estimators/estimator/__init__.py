"""The interface of every estimator, with refitting, saving and reports."""

from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.fit_report import FitReport

__all__ = ["FitReport", "UncertaintyEstimator"]
