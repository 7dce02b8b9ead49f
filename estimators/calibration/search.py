"""The trials of a search over the values of an option: predict validation rows, calibrate, keep the best."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from estimators.calibration.calibration import Calibration
from estimators.calibration.trials import Trial
from estimators.calibration.validation import Predictor, ValidationPredictions, ValidationRows
from estimators.errors import ConvergenceError, EstimatorError, IndefiniteHessianError, LambdaTooLargeError

__all__ = ["Fit", "Search"]

_NUMERICAL_ERRORS = (IndefiniteHessianError, ConvergenceError, LambdaTooLargeError)


class Fit(Predictor, Protocol):
    """A fitted estimator, which counts its passes."""

    @property
    def passes_(self) -> float:
        """The passes over the training rows so far."""
        ...


E = TypeVar("E", bound=Fit)


class Search(Generic[E]):
    """The trials so far. Of the fits, only the best is kept."""

    def __init__(self, rows: ValidationRows, calibrate: Callable[[ValidationPredictions], Calibration]) -> None:
        self.rows, self.calibrate = rows, calibrate
        self.trials: list[Trial] = []
        self._best: tuple[Trial, E, Calibration] | None = None
        self._error: EstimatorError | None = None

    def evaluate(self, value: Any, fit: Callable[[], E], *, is_given: bool, passes_before: float) -> None:  # noqa: ANN401
        """Fit, predict the validation rows and calibrate. A fit that fails numerically becomes a failed trial.

        Args:
            value: the value of the option.
            fit: returns the fit with this value.
            is_given: whether it is the fit that the search starts from.
            passes_before: the passes of the estimator that are not those of this trial.
        """
        start = time.perf_counter()
        try:
            estimator = fit()
            calibration = self.calibrate(_check_finite(self.rows.predicted(estimator)))
        except _NUMERICAL_ERRORS as error:
            self._error = error
            seconds, failure = time.perf_counter() - start, f"{type(error).__name__}: {error}"
            self.trials.append(Trial(value, None, seconds=seconds, refitted=not is_given, failure=failure))
            return
        passes, seconds = estimator.passes_ - passes_before, time.perf_counter() - start
        trial = Trial(value, calibration, passes, seconds, refitted=not is_given)
        self.trials.append(trial)
        if self._best is None or (calibration.score, not is_given) < (self._best[2].score, self._best[0].refitted):
            self._best = trial, estimator, calibration

    def best(self) -> tuple[Trial, E, Calibration]:
        """Return the trial with the smallest score, its fit and calibration. Raises the last error if all failed."""
        if self._best is None:
            assert self._error is not None
            raise self._error
        return self._best


def _check_finite(predicted: ValidationPredictions) -> ValidationPredictions:
    """Return the predictions. Raises ConvergenceError if they are not finite, as those of a diverged fit."""
    if not predicted.finite:
        raise ConvergenceError(
            "a fit whose predictions are finite",
            received="NaN or Inf",
            remedy="try values nearer to that of the given fit.",
        )
    return predicted
