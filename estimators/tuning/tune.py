"""The tuning protocol of every method: one fit per value of an option, each calibrated over the same grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from estimators.calibration.calibration import Calibration, calibrate_predictions, warn_at_boundary
from estimators.calibration.grid import DEFAULT_GRID, CalibrationGrid
from estimators.calibration.scores import Score, Scorer
from estimators.calibration.search import Search
from estimators.calibration.tuned_option import DECADES, TunedOption, same_value
from estimators.calibration.validation import ValidationPredictions, ValidationRows
from estimators.estimator.base import UncertaintyEstimator
from estimators.option_checks import checked_number
from estimators.tuning.tuned import Tuned, record_calibration

__all__ = ["grid_search", "tune"]

E = TypeVar("E", bound=UncertaintyEstimator)


def tune(
    estimator: E,
    val_loader: Iterable[Any],
    *,
    option: str | None = "prior_precision",
    values: Sequence[Any] | None = None,
    grid: CalibrationGrid = DEFAULT_GRID,
    score: Score = "nll",
    refine: bool = True,
    shrinkage: float = 0.0,
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
        shrinkage: weight w ≥ 0 of a penalty w (log t)², in nats for all rows together, on a softmax temperature or
            noise factor t. Few rows, all classified correctly, do not determine a temperature without it.
            `fit(val_loader=)` and the comparison use `estimators.tuning.shrinkage_of_few_rows`.

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
    if not same_value(estimator.prior_precision_, estimator.prior_precision):  # chosen by fit: an option of the clone
        estimator = estimator.clone_with()
    tuned_option = TunedOption(option)
    candidates = tuned_option.candidates(estimator, values, decades=DECADES)
    weight = checked_number("shrinkage", shrinkage, at_least=0, remedy="0, or shrinkage_of_few_rows(kind).")
    scorer = Scorer(score, estimator.likelihood)
    calibrate = partial(calibrate_predictions, grid=grid, scorer=scorer, refine=refine, shrinkage=weight)
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
    search: Search[E] = Search(rows, calibrate)
    for value in candidates:
        is_given = same_value(value, given)
        fit = (lambda: estimator) if is_given else partial(option.refit, estimator, value)
        search.evaluate(value, fit, is_given=is_given, passes_before=estimator.passes_ if is_given else 0.0)
    trial, chosen_estimator, calibration = search.best()
    record_calibration(chosen_estimator, calibration)
    seconds = time.perf_counter() - start
    trials = tuple(search.trials)
    return Tuned(calibration, option, trials, trial, seconds, rows.batches.n_data, estimator=chosen_estimator)
