"""Fair tuning: one protocol for every method, on validation rows, with every score kept."""

from estimators.tuning.calibration import Calibration, calibrate
from estimators.tuning.grid import CalibrationGrid
from estimators.tuning.prior import optimize_prior_precision
from estimators.tuning.trials import Point, ScoreGrid
from estimators.tuning.tune import tune
from estimators.tuning.tuned import Tuned

__all__ = [
    "Calibration",
    "CalibrationGrid",
    "Point",
    "ScoreGrid",
    "Tuned",
    "calibrate",
    "optimize_prior_precision",
    "tune",
]
