"""The prior precision alone: by the posterior predictive on validation rows, or by the marginal likelihood."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from estimators.errors import IndefiniteHessianError, OptionError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.likelihoods import Gaussian
from estimators.tuning.calibration import Calibration, calibrated_on, warn_of_edges
from estimators.tuning.grid import IDENTITY
from estimators.tuning.refinement import Optimum, between_neighbours
from estimators.tuning.scores import Score, Scorer
from estimators.tuning.trials import Point
from estimators.tuning.tune import searched
from estimators.tuning.tuned import Tuned
from estimators.tuning.tuned_option import TunedOption, is_number
from estimators.tuning.validation import ValidationRows

__all__ = ["optimize_prior_precision"]

E = TypeVar("E", bound=UncertaintyEstimator)

_AXIS = TunedOption("prior_precision")
_DECADES = 4.0


def optimize_prior_precision(
    estimator: E,
    val_loader: Iterable[Any] | None = None,
    *,
    method: str = "gridsearch",
    grid: Sequence[float] | None = None,
    score: Score = "nll",
) -> Tuned[E]:
    """A new fit at the δ with the best validation score, or the largest marginal likelihood; θ̂ stays where it is.

        gridsearch   argmin over the grid of −log p(y | x) on validation rows, mean over rows (regression: of
                     N(mean, epistemic + σ²)), computed anew at every δ
        marglik      argmax of log p(D | δ) in its Laplace approximation: over the grid, then between the neighbours of
                     the best (Immer et al. 2021)

    Args:
        estimator: fitted; it stays as it is.
        val_loader: a re-iterable of rows that no network was trained on; "marglik" does not look at it.
        method: "gridsearch" or "marglik".
        grid: values of δ, beside the one that was fitted. None: four a decade, four decades either way.
        score: of "gridsearch": "nll", or a function of (prediction, targets), lower is better.

    The result has the whole `curve`; its `calibration` is none.
    Warns: TuningEdgeWarning where the choice is the last of the grid.
    Errors: OptionError; UnsupportedError for "marglik" where there is no marginal likelihood; those of `fit`.
    """
    if method not in ("gridsearch", "marglik"):
        raise OptionError('method "gridsearch" or "marglik"', received=repr(method), remedy='use "gridsearch".')
    values = _AXIS.candidates(estimator, grid, decades=_DECADES)
    if method == "marglik":
        if score != "nll":
            raise OptionError("no score of one's own for marglik", received=repr(score), remedy='"gridsearch".')
        tuned = _by_evidence(estimator, values)
    elif val_loader is None:
        raise OptionError("validation rows for gridsearch", received="none", remedy='pass them, or "marglik".')
    else:
        calibrated = partial(calibrated_on, grid=IDENTITY, scorer=Scorer(score, estimator.likelihood), refine=False)
        tuned = searched(estimator, _AXIS, values, ValidationRows.of(val_loader), calibrated)
    warn_of_edges(tuned.at_edge, tuned.places)
    return tuned


def _by_evidence(estimator: E, values: Sequence[Any]) -> Tuned[E]:
    """The largest log p(D | δ)."""
    evidence = _Evidence(estimator, values)
    start, spent = time.perf_counter(), estimator.passes_
    on_grid = Optimum(*min((((v,), evidence(v)) for v in values), key=lambda place_and_score: place_and_score[1]))
    found = between_neighbours(evidence, on_grid, [values], tolerance=1e-6)
    if found.score == math.inf:
        assert evidence.error is not None
        raise evidence.error
    (value,) = found.place
    fitted = _AXIS.at(estimator, value)
    passes = estimator.passes_ - spent + fitted.passes_
    curve = tuple(evidence.point(tried, value, passes) for tried in sorted(evidence.tried))
    chosen = next(point for point in curve if point.value == value)
    assert chosen.calibration is not None
    return Tuned(fitted, chosen.calibration, _AXIS, curve, chosen, time.perf_counter() - start, validation_rows=0)


class _Evidence:
    """−log p(D | δ) of a fit at its θ̂, infinite where A is indefinite, and what was tried."""

    def __init__(self, estimator: UncertaintyEstimator, values: Sequence[Any]) -> None:
        if not hasattr(estimator, "log_marginal_likelihood"):
            raise UnsupportedError(
                "an estimator with a marginal likelihood",
                received=type(estimator).__name__,
                remedy='LinearizedLaplace or LastLayerLaplace, or method="gridsearch" with validation rows.',
            )
        if not all(map(is_number, values)):
            raise OptionError(
                "one number for prior_precision in marglik", received=repr(values[0]), remedy='"gridsearch".'
            )
        self.estimator, self.log_marginal_likelihood = estimator, estimator.log_marginal_likelihood
        self.tried: dict[float, float] = {}
        self.error: IndefiniteHessianError | None = None

    def __call__(self, prior_precision: float) -> float:
        try:
            self.tried[prior_precision] = -float(self.log_marginal_likelihood(prior_precision))
        except IndefiniteHessianError as error:
            self.error, self.tried[prior_precision] = error, math.inf
        return self.tried[prior_precision]

    def point(self, value: float, chosen: float, passes: float) -> Point:
        """Of the curve; the one chosen alone was fitted, and bears what all of them spent."""
        score, likelihood = self.tried[value], self.estimator.likelihood
        if score == math.inf:
            return Point(value, None, refitted=False, failure=str(self.error))
        calibration = Calibration(
            likelihood.kind,
            IDENTITY,
            torch.full((1, 1), score, dtype=torch.float64),
            score=score,
            score_name="negative log marginal likelihood",
            sigma=_sigma(likelihood),
        )
        return Point(value, calibration, passes if value == chosen else 0.0, refitted=value == chosen)


def _sigma(likelihood: object) -> float | None:
    if not isinstance(likelihood, Gaussian):
        return None
    return float(torch.as_tensor(likelihood.sigma_noise, dtype=torch.float64).log().mean().exp())
