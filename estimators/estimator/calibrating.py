"""Calibration of a fit on validation rows: its prior precision, variance scale, and temperature or noise."""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

from estimators.calibration.calibration import calibrate_predictions, shrinkage_of_few_rows
from estimators.calibration.grid import COARSE_GRID
from estimators.calibration.record import CalibrationRecord
from estimators.calibration.scores import Scorer
from estimators.calibration.search import Search
from estimators.calibration.tuned_option import DECADES, TunedOption, log_spaced, same_value
from estimators.calibration.validation import ValidationRows
from estimators.data.checks import check_inputs
from estimators.errors import TuningBoundaryWarning, UncalibratedWarning
from estimators.estimator.cloning import CloningMixin
from estimators.estimator.fit_report import FitReport
from estimators.likelihoods.prediction import Prediction
from estimators.numerics.pytrees import PyTree
from estimators.objective.objective import Objective
from estimators.option_checks import PriorOption, shown

__all__ = ["CalibrationMixin"]

_PRIOR_PRECISION = frozenset({"prior_precision"})
_PHASE = "calibration"
"""The phase of the passes in `fit_report_`."""


_REMEDIES = {
    "variance_scale": "another prior_precision, or estimators.tune with a wider CalibrationGrid",
    "softmax_temperature": "estimators.tune with a wider CalibrationGrid, after a look at the labels of these rows",
    "sigma_noise": "Gaussian(sigma_noise=...) of the size of the residuals",
}
"""What to try if a choice is at an end of its range, by its name."""


class CalibrationMixin(CloningMixin):
    """The part of `fit` that uses validation rows, and the warning of a prediction that was not calibrated."""

    uses_prior_precision: ClassVar[bool] = False
    """Whether the variance is that of a posterior at `prior_precision`. `predict` then warns if not calibrated."""

    @property
    def keeps_curvature(self) -> bool:
        """Whether this fit has the data's curvature, so that `_refit` for another prior precision needs no pass."""
        return False

    def _check_validation(self, rows: ValidationRows, objective: Objective) -> None:
        """Raise DataError if the network cannot take the first validation batch: now rather than after the fit."""
        with objective.network.pass_counter.phase(_PHASE):
            check_inputs(next(iter(rows.batches)).x, objective.network, what="validation batch")

    def _calibrate(self, rows: ValidationRows) -> None:
        """Choose prior precision, variance scale, and temperature or noise by the smallest validation NLL.

        The search is that of `estimators.tuning.tune`, but the fit itself moves to each prior precision.
        """
        start, before = time.perf_counter(), self.passes_
        scorer = Scorer("nll", self.likelihood)
        shrinkage = shrinkage_of_few_rows(self.likelihood.kind)
        calibrate = partial(calibrate_predictions, grid=COARSE_GRID, scorer=scorer, refine=True, shrinkage=shrinkage)
        search: Search[CalibrationMixin] = Search(rows, calibrate)
        given, values = self.prior_precision, self._prior_candidates()
        for value in values:
            move = partial(self._moved_to_prior, value)
            search.evaluate(value, move, is_given=same_value(value, given), passes_before=self.passes_)
        chosen, _, calibration = search.best()
        self._moved_to_prior(chosen.value)
        option = TunedOption("prior_precision" if len(values) > 1 else None)
        seconds = time.perf_counter() - start
        trials = tuple(search.trials)
        self.calibration_ = CalibrationRecord(calibration, option, trials, chosen, seconds, rows.batches.n_data)
        self._report_calibration(self.passes_ - before)
        self._warn_at_boundary()

    def _warn_at_boundary(self) -> None:
        """Warn with TuningBoundaryWarning if scale, temperature or noise are at an end of their range.

        A prior precision at an end is no reason to warn: the variance scale makes up for it.
        """
        record = self.calibration_
        names = () if record is None else record.calibration.at_boundary
        if record is None or not names:
            return
        values = record.chosen_values
        listed = ", ".join(f"{name}={shown(values[name], 80)}" for name in names)
        remedies = [_REMEDIES[name] for name in names]
        warnings.warn(
            f"the validation rows chose the last value of a range: {listed}. The best value may lie beyond. Try "
            f"{', and '.join(remedies)}; or more validation rows.",
            TuningBoundaryWarning,
            stacklevel=5,
        )

    def _prior_candidates(self) -> list[Any]:
        """Return four values per decade around the given prior precision; only that if each would need a refit."""
        given = self.prior_precision
        if not self.keeps_curvature or same_value(given, 0):
            return [given]
        factors = log_spaced(1.0, decades=DECADES)
        if isinstance(given, Mapping):
            return [{name: factor * value for name, value in given.items()} for factor in factors]
        return [factor * given for factor in factors]

    def _moved_to_prior(self, value: PriorOption) -> Self:
        """Move this fit to another prior precision if that needs no pass, and return it."""
        if not self.keeps_curvature:
            return self
        prior = self._prior(self.network_, value)
        objective = replace(self.objective_, prior=prior)
        self._refit(self, objective, _PRIOR_PRECISION)
        self.objective_ = objective
        return self

    def _report_calibration(self, passes: float) -> None:
        report = self.fit_report_
        if self.counts_passes and isinstance(report, FitReport):
            self.fit_report_ = replace(report, passes={**report.passes, _PHASE: passes})

    def _finish_prediction(self, prediction: Prediction, *, is_scaled: bool = False) -> Prediction:
        """Apply the calibration of the fit, and return the prediction in the units of the targets.

        With `is_scaled`, the variance of the prediction is already that of the scaled posterior.
        """
        if self.calibration_ is not None:
            calibration = self.calibration_.calibration
            prediction = (replace(calibration, variance_scale=1.0) if is_scaled else calibration).apply(prediction)
        elif self.uses_prior_precision and not self._warned:
            self._warned = True
            warnings.warn(
                f"this prediction is that of the plain posterior at prior_precision={self.prior_precision!r:.80}, "
                "which is not calibrated: choose prior precision and variance scale by "
                "fit(train_loader, val_loader=...), or ignore UncalibratedWarning",
                UncalibratedWarning,
                stacklevel=4,
            )
        return self.likelihood.to_target_units(prediction)

    @abstractmethod
    def predict_uncalibrated(self, x: PyTree) -> Prediction:
        """Return the prediction before calibration, in the units of the network's outputs."""
