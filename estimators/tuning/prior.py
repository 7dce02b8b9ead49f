"""Tune the prior precision alone: by the posterior predictive on validation rows, or by the marginal likelihood."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from estimators.calibration.calibration import Calibration, calibrate_predictions, warn_at_boundary
from estimators.calibration.grid import IDENTITY
from estimators.calibration.refinement import Optimum, refine_between_neighbours
from estimators.calibration.scores import Score, Scorer
from estimators.calibration.trials import Trial
from estimators.calibration.tuned_option import TunedOption, is_number
from estimators.calibration.validation import ValidationRows
from estimators.errors import IndefiniteHessianError, OptionError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.likelihoods import Gaussian
from estimators.tuning.tune import grid_search
from estimators.tuning.tuned import Tuned

__all__ = ["optimize_prior_precision"]

E = TypeVar("E", bound=UncertaintyEstimator)

_PRIOR_PRECISION = TunedOption("prior_precision")
_DECADES = 4.0
"""The default range on either side of the given δ, as in laplace-torch's grid search."""
_MARGLIK_TOLERANCE = 1e-6
"""The tolerance of log δ at the largest marginal likelihood."""


def optimize_prior_precision(
    estimator: E,
    val_loader: Iterable[Any] | None = None,
    *,
    method: str = "gridsearch",
    grid: Sequence[float] | None = None,
    score: Score = "nll",
) -> Tuned[E]:
    """Return a new fit with the δ of the best validation score, or of the largest marginal likelihood, at the same θ̂.

        gridsearch   argmin over the grid of the mean −log p(y | x) of the validation rows; in regression of
                     N(mean, epistemic + σ²)
        marglik      argmax of the Laplace approximation of log p(D | δ), over the grid, then between the neighbours of
                     the best point (Immer et al. 2021, "Scalable marginal likelihood estimation for model selection in
                     deep learning", equation 7)

    Args:
        estimator: a fitted estimator; it is not changed.
        val_loader: a re-iterable of rows that no network was trained on; not used by "marglik".
        method: "gridsearch" or "marglik".
        grid: values of δ beside the fitted one. None: four per decade, four decades either way.
        score: for "gridsearch", "nll" or a function of (prediction, targets) to a float, lower is better.

    Returns:
        The new fit with all `trials`. Its `calibration` changes nothing.

    Raises:
        OptionError: for an unknown method, or options that do not go together.
        UnsupportedError: if "marglik" is used with an estimator without a marginal likelihood.

    Warns:
        TuningBoundaryWarning: if the choice is at an end of the grid.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators import LinearizedLaplace
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(50, 3)
        >>> estimator = LinearizedLaplace(nn.Linear(3, 1), "regression").fit([(x, torch.randn(50, 1))])
        >>> tuned = optimize_prior_precision(estimator, method="marglik")
        >>> tuned.estimator.prior_precision > 0
        True
    """
    if method not in ("gridsearch", "marglik"):
        raise OptionError('method "gridsearch" or "marglik"', received=repr(method), remedy='use "gridsearch".')
    values = _PRIOR_PRECISION.candidates(estimator, grid, decades=_DECADES)
    if method == "marglik":
        if score != "nll":
            raise OptionError("no custom score with marglik", received=repr(score), remedy='use "gridsearch".')
        tuned = _maximize_evidence(estimator, values)
    elif val_loader is None:
        raise OptionError("validation rows for gridsearch", received="none", remedy='pass them, or use "marglik".')
    else:
        scorer = Scorer(score, estimator.likelihood)
        calibrate = partial(calibrate_predictions, grid=IDENTITY, scorer=scorer, refine=False)
        tuned = grid_search(estimator, _PRIOR_PRECISION, values, ValidationRows.of(val_loader), calibrate)
    warn_at_boundary(tuned.at_boundary, tuned.chosen_values)
    return tuned


def _maximize_evidence(estimator: E, values: Sequence[Any]) -> Tuned[E]:
    """Return a fit with the δ of the largest log p(D | δ)."""
    evidence = _NegativeEvidence(estimator, values)
    start, passes_before = time.perf_counter(), estimator.passes_
    on_grid = min((Optimum((value,), evidence(value)) for value in values), key=lambda optimum: optimum.score)
    found = refine_between_neighbours(evidence, on_grid, [values], tolerance=_MARGLIK_TOLERANCE)
    if found.score == math.inf:
        assert evidence.error is not None
        raise evidence.error
    (value,) = found.location
    fitted = _PRIOR_PRECISION.refit(estimator, value)
    passes = estimator.passes_ - passes_before + fitted.passes_
    trials = tuple(evidence.trial(tried, value, passes) for tried in sorted(evidence.scores))
    chosen = next(trial for trial in trials if trial.value == value)
    assert chosen.calibration is not None
    seconds = time.perf_counter() - start
    record = chosen.calibration, _PRIOR_PRECISION, trials, chosen, seconds
    return Tuned(*record, validation_rows=0, estimator=fitted)


class _NegativeEvidence:
    """−log p(D | δ) at a fit's θ̂ as a function of δ, infinite if A is indefinite. It records every evaluation."""

    def __init__(self, estimator: UncertaintyEstimator, values: Sequence[Any]) -> None:
        if type(estimator).log_marginal_likelihood is UncertaintyEstimator.log_marginal_likelihood:
            raise UnsupportedError(
                "an estimator with a marginal likelihood",
                received=type(estimator).__name__,
                remedy="LinearizedLaplace, LastLayerLaplace or SubnetworkLaplace; or "
                'method="gridsearch" with validation rows.',
            )
        if not all(map(is_number, values)):
            raise OptionError(
                "one number for prior_precision in marglik", received=repr(values[0]), remedy='use "gridsearch".'
            )
        self.estimator, self.log_marginal_likelihood = estimator, estimator.log_marginal_likelihood
        self.scores: dict[float, float] = {}
        self.error: IndefiniteHessianError | None = None

    def __call__(self, prior_precision: float) -> float:
        try:
            self.scores[prior_precision] = -float(self.log_marginal_likelihood(prior_precision))
        except IndefiniteHessianError as error:
            self.error, self.scores[prior_precision] = error, math.inf
        return self.scores[prior_precision]

    def trial(self, value: float, chosen: float, passes: float) -> Trial:
        """Return the trial of one δ. Only the chosen δ is fitted; it carries the passes of all evaluations."""
        score, likelihood = self.scores[value], self.estimator.likelihood
        if score == math.inf:
            return Trial(value, None, refitted=False, failure=str(self.error))
        calibration = Calibration(
            likelihood.kind,
            IDENTITY,
            torch.full((1, 1), score, dtype=torch.float64),
            score=score,
            score_name="negative log marginal likelihood",
            sigma=_mean_sigma(likelihood),
        )
        return Trial(value, calibration, passes if value == chosen else 0.0, refitted=value == chosen)


def _mean_sigma(likelihood: object) -> float | None:
    """Return the geometric mean of σ over outputs; None if the likelihood is not Gaussian."""
    if not isinstance(likelihood, Gaussian):
        return None
    return float(torch.as_tensor(likelihood.sigma_noise, dtype=torch.float64).log().mean().exp())
