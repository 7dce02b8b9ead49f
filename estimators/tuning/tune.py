"""The tuning protocol of every method: one fit per value of an option, each calibrated over the same grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from estimators.errors import ConvergenceError, EstimatorError, IndefiniteHessianError, LambdaTooLargeError
from estimators.estimator.base import UncertaintyEstimator
from estimators.tuning.calibration import Calibration, calibrate_predictions, warn_at_boundary
from estimators.tuning.grid import DEFAULT_GRID, CalibrationGrid
from estimators.tuning.scores import Score, Scorer
from estimators.tuning.trials import Trial
from estimators.tuning.tuned import Tuned, record_calibration
from estimators.tuning.tuned_option import TunedOption, same_value
from estimators.tuning.validation import ValidationPredictions, ValidationRows

__all__ = ["grid_search", "tune"]

E = TypeVar("E", bound=UncertaintyEstimator)

_NUMERICAL_ERRORS = (IndefiniteHessianError, ConvergenceError, LambdaTooLargeError)
_DECADES = 1.0
"""The default range of an option on either side of the given value: a trained δ or σ has the right magnitude."""


def tune(
    estimator: E,
    val_loader: Iterable[Any],
    *,
    option: str | None = "prior_precision",
    values: Sequence[Any] | None = None,
    grid: CalibrationGrid = DEFAULT_GRID,
    score: Score = "nll",
    refine: bool = True,
) -> Tuned[E]:
    """Tune one option of a fit, and the calibration of its predictions, on held-out rows.

    For each value of the option, a new fit is made from the given one by `clone_with`. Its predictions of the
    validation rows are calibrated over the whole grid. The fit and calibration with the smallest score are chosen;
    if scores are equal, the given fit is. The given fit counts as one of the values and costs nothing.

    Args:
        estimator: a fitted estimator; it is not changed.
        val_loader: a re-iterable of (x, y) or of dicts with "labels"; rows that no network was trained on.
        option: an option of the constructor, "sigma_noise", an option of a part ("solver.lam"), or None to calibrate
            only.
        values: the values to try. None: for prior_precision and sigma_noise, four per decade, one decade either way.
        grid: the calibrations to try on the predictions of every fit.
        score: "nll" (in nats), or a function of (prediction, targets) to a float, lower is better.
        refine: whether to search between the points of the grid, for every value alike.

    Returns:
        The chosen fit with its calibration, and all trials.

    Raises:
        OptionError: for an unknown option, or values that cannot be tried.
        DataError: for unusable validation rows.
        ConvergenceError, IndefiniteHessianError, LambdaTooLargeError: if every fit fails; a single fit that fails
            becomes a failed trial.

    Warns:
        TuningBoundaryWarning: if the choice is at an end of a range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators import LinearizedLaplace
        >>> _ = torch.manual_seed(0)
        >>> train = [(torch.randn(20, 3), torch.randn(20, 1))]
        >>> validation = [(torch.randn(50, 3), torch.randn(50, 1))]
        >>> estimator = LinearizedLaplace(nn.Linear(3, 1), "regression").fit(train)
        >>> tuned = tune(estimator, validation, option=None)
        >>> tuned.predict(torch.randn(4, 3)).total_variance.shape
        torch.Size([4, 1])
    """
    tuned_option = TunedOption(option)
    candidates = tuned_option.candidates(estimator, values, decades=_DECADES)
    calibrate = partial(calibrate_predictions, grid=grid, scorer=Scorer(score, estimator.likelihood), refine=refine)
    tuned = grid_search(estimator, tuned_option, candidates, ValidationRows.of(val_loader), calibrate)
    warn_at_boundary(tuned.at_boundary, tuned.chosen_values)
    return tuned


def grid_search(
    estimator: E,
    option: TunedOption,
    candidates: Sequence[Any],
    rows: ValidationRows,
    calibrate: Callable[[ValidationPredictions], Calibration],
) -> Tuned[E]:
    """Return the best of all candidates, without a warning at a boundary."""
    start, given = time.perf_counter(), option.value_of(estimator)
    search: _Search[E] = _Search(rows, calibrate)
    for value in candidates:
        is_given = same_value(value, given)
        fit = (lambda: estimator) if is_given else partial(option.refit, estimator, value)
        search.evaluate(value, fit, is_given=is_given)
    trial, chosen_estimator, calibration = search.best()
    record_calibration(chosen_estimator, calibration)
    seconds = time.perf_counter() - start
    return Tuned(chosen_estimator, calibration, option, tuple(search.trials), trial, seconds, rows.batches.n_data)


class _Search(Generic[E]):
    """The trials so far. Of the fits, only the best is kept."""

    def __init__(self, rows: ValidationRows, calibrate: Callable[[ValidationPredictions], Calibration]) -> None:
        self.rows, self.calibrate = rows, calibrate
        self.trials: list[Trial] = []
        self._best: tuple[Trial, E, Calibration] | None = None
        self._error: EstimatorError | None = None

    def evaluate(self, value: Any, fit: Callable[[], E], *, is_given: bool) -> None:  # noqa: ANN401
        """Fit, predict the validation rows and calibrate. A fit that fails numerically becomes a failed trial."""
        start = time.perf_counter()
        try:
            estimator = fit()
            passes_before = estimator.passes_ if is_given else 0.0
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
