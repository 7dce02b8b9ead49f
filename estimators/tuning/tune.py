"""The protocol that every method goes through: a fit for each value of one axis, each calibrated over the same grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from estimators.errors import ConvergenceError, EstimatorError, IndefiniteHessianError, LambdaTooLargeError
from estimators.estimator.base import UncertaintyEstimator
from estimators.tuning.calibration import Calibration, calibrated_on, warn_of_edges
from estimators.tuning.grid import DEFAULT_GRID, CalibrationGrid
from estimators.tuning.scores import Score, Scorer
from estimators.tuning.trials import Point
from estimators.tuning.tuned import Tuned, mark_tuned
from estimators.tuning.tuned_option import TunedOption, same
from estimators.tuning.validation import Predicted, ValidationRows

__all__ = ["searched", "tune"]

E = TypeVar("E", bound=UncertaintyEstimator)

_FAILURES = (IndefiniteHessianError, ConvergenceError, LambdaTooLargeError)
_DECADES = 1.0


def tune(
    estimator: E,
    val_loader: Iterable[Any],
    *,
    axis: str | None = "prior_precision",
    values: Sequence[Any] | None = None,
    grid: CalibrationGrid = DEFAULT_GRID,
    score: Score = "nll",
    refine: bool = True,
) -> Tuned[E]:
    """Tune one option of a fit, and the calibration of its predictions, on rows that no network was trained on.

    For each value of the axis a new fit is made from the given one, which counts as a value and costs nothing. Its
    predictions of the validation rows are calibrated over the whole grid. The least score of all is chosen, and the
    given fit where scores are equal.

    Args:
        estimator: fitted; it stays as it is.
        val_loader: a re-iterable of (x, y) or of dicts with "labels".
        axis: an option of the constructor, "sigma_noise", that of a part ("solver.lam"), or None to calibrate alone.
        values: what to try on the axis. None, for prior_precision and sigma_noise: four a decade, a decade either way.
        grid: what is tried on the predictions of every fit.
        score: "nll", or a function of (prediction, targets), lower is better.
        refine: whether to look between the points of the grid, at every value alike.

    Warns: TuningEdgeWarning where the choice is the last of a range.
    Errors: OptionError for an axis or values that are none; DataError for validation rows that are none. A value whose
    fit fails for numerical reasons is kept as failed; where all do, the last of their errors is raised.
    """
    named = TunedOption(axis)
    candidates = named.candidates(estimator, values, decades=_DECADES)
    calibrated = partial(calibrated_on, grid=grid, scorer=Scorer(score, estimator.likelihood), refine=refine)
    tuned = searched(estimator, named, candidates, ValidationRows.of(val_loader), calibrated)
    warn_of_edges(tuned.at_edge, tuned.places)
    return tuned


def searched(
    estimator: E,
    named: TunedOption,
    candidates: Sequence[Any],
    rows: ValidationRows,
    calibrated: Callable[[Predicted], Calibration],
) -> Tuned[E]:
    """`tune`, without the warning."""
    start, given = time.perf_counter(), named.value_of(estimator)
    search: _Search[E] = _Search(rows, calibrated)
    for value in candidates:
        is_given = same(value, given)
        fit = partial(_itself, estimator) if is_given else partial(named.at, estimator, value)
        search.visit(value, fit, is_given=is_given)
    point, tuned_estimator, calibration = search.best()
    mark_tuned(tuned_estimator, calibration)
    seconds = time.perf_counter() - start
    return Tuned(tuned_estimator, calibration, named, tuple(search.curve), point, seconds, rows.batches.n_data)


class _Search(Generic[E]):
    """The values visited so far; of the fits only the best is kept."""

    def __init__(self, rows: ValidationRows, calibrated: Callable[[Predicted], Calibration]) -> None:
        self.rows, self.calibrated = rows, calibrated
        self.curve: list[Point] = []
        self._best: tuple[Point, E, Calibration] | None = None
        self._error: EstimatorError | None = None

    def visit(self, value: Any, fit: Callable[[], E], *, is_given: bool) -> None:  # noqa: ANN401
        """Fit, predict the validation rows, calibrate; what fails for numerical reasons has no score."""
        start = time.perf_counter()
        try:
            estimator = fit()
            spent = estimator.passes_ if is_given else 0.0
            calibration = self.calibrated(_finite(self.rows.predicted(estimator)))
        except _FAILURES as error:
            self._error = error
            seconds, failure = time.perf_counter() - start, f"{type(error).__name__}: {error}"
            self.curve.append(Point(value, None, seconds=seconds, refitted=not is_given, failure=failure))
            return
        passes, seconds = estimator.passes_ - spent, time.perf_counter() - start
        point = Point(value, calibration, passes, seconds, refitted=not is_given)
        self.curve.append(point)
        if self._best is None or (calibration.score, not is_given) < (self._best[2].score, self._best[0].refitted):
            self._best = point, estimator, calibration

    def best(self) -> tuple[Point, E, Calibration]:
        """The point of the least score, with its fit. Errors: the last one, where every value failed."""
        if self._best is None:
            assert self._error is not None
            raise self._error
        return self._best


def _finite(predicted: Predicted) -> Predicted:
    """The same. Errors: ConvergenceError where a fit was lost, whose predictions are no numbers."""
    if not predicted.finite:
        raise ConvergenceError(
            "a fit whose predictions are finite",
            received="NaN or Inf",
            remedy="values nearer to that of the given fit.",
        )
    return predicted


def _itself(estimator: E) -> E:
    return estimator
