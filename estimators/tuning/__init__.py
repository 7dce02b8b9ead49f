"""Tuning on validation rows: one protocol for every method, with every score kept."""

from estimators.calibration.calibration import Calibration, calibrate, shrinkage_of_few_rows
from estimators.calibration.grid import CalibrationGrid
from estimators.calibration.record import CalibrationRecord
from estimators.calibration.trials import ScoreGrid, Trial
from estimators.tuning.prior import optimize_prior_precision
from estimators.tuning.tune import tune
from estimators.tuning.tuned import Tuned

__all__ = [
    "Calibration",
    "CalibrationGrid",
    "CalibrationRecord",
    "ScoreGrid",
    "Trial",
    "Tuned",
    "calibrate",
    "optimize_prior_precision",
    "shrinkage_of_few_rows",
    "tune",
]
