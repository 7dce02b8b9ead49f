"""Calibration of stored predictions: a scale of the variance, and a softmax temperature or a noise. No refit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from estimators.calibration.grid import DEFAULT_GRID, CalibrationGrid
from estimators.calibration.refinement import Optimum, refine_between_neighbours
from estimators.calibration.scores import Score, Scorer
from estimators.calibration.validation import ValidationPredictions, apply_calibration
from estimators.errors import OptionError, TuningBoundaryWarning
from estimators.likelihoods import Likelihood
from estimators.likelihoods.prediction import Prediction

__all__ = ["Calibration", "calibrate", "calibrate_predictions", "shrinkage_of_few_rows", "warn_at_boundary"]

_NORMAL_TEMPERATURE, _NORMAL_NOISE = 1.5, 2.0
"""One standard deviation, as a factor, of the normal prior on the logarithm of a softmax temperature and of a noise
factor. The penalty in nats does not grow with the validation rows, so that it matters only if there are few. Without
it, 40 to 120 rows gave temperatures of 0.1 on wine and breast-cancer, and up to 4.6 times the test NLL of the network
(docs/benchmarks/calibration.md). A noise may be further from 1, since many users do not set σ."""

TrialRecord = dict[str, float | None]


@dataclass(frozen=True)
class Calibration:
    """The calibration with the smallest score, and every score that it was chosen by. Made by `calibrate` and `tune`.

    If scores are equal, the calibration nearest to no change is chosen.

    Attributes:
        kind: the kind of the predictions, such as "regression".
        grid: the values that were tried.
        scores: (scales, noise factors or temperatures), the scores of the whole grid.
        variance_scale: the factor of the epistemic variance.
        noise_or_temperature: the factor of σ in regression, else the softmax temperature.
        score: the smallest score.
        score_name: the name of the score, such as "NLL".
        sigma: σ before calibration in regression, else None.
        evaluations: how many scores the refinement added to the grid.
    """

    kind: str
    grid: CalibrationGrid
    scores: Tensor
    variance_scale: float = 1.0
    noise_or_temperature: float = 1.0
    score: float = math.inf
    score_name: str = "NLL"
    sigma: float | None = None
    evaluations: int = 0

    @property
    def refined(self) -> bool:
        """Whether the choice lies between points of the grid."""
        second = self.grid.noise_or_temperature(self.kind)
        return not (self.variance_scale in self.grid.variance_scales and self.noise_or_temperature in second)

    @property
    def uncalibrated_score(self) -> float:
        """The score with variance scale 1 and temperature or noise factor 1."""
        second = self.grid.noise_or_temperature(self.kind)
        return float(self.scores[self.grid.variance_scales.index(1.0), second.index(1.0)])

    def __repr__(self) -> str:
        """Return the choice and its score, without the scores of the grid."""
        chosen = ", ".join(f"{name}={value:.4g}" for name, value in self.chosen().items() if name != "score")
        return f"Calibration({self.kind}, {chosen}, {self.score_name} {self.score:.4g}, {self.scores.numel()} points)"

    @property
    def second_name(self) -> str:
        """The name of what is calibrated beside the variance: "sigma_noise" or "softmax_temperature"."""
        return "sigma_noise" if self.kind == "regression" else "softmax_temperature"

    @property
    def softmax_temperature(self) -> float:
        """The chosen softmax temperature.

        Raises:
            OptionError: for regression.
        """
        return self.noise_or_temperature if self.kind != "regression" else self._raise_absent("softmax_temperature")

    @property
    def sigma_noise(self) -> float:
        """The calibrated σ in target units; the geometric mean if each output has its own.

        Raises:
            OptionError: unless the kind is regression.
        """
        if self.sigma is None:
            return self._raise_absent("sigma_noise")
        return self.sigma * self.noise_or_temperature

    @property
    def at_boundary(self) -> tuple[str, ...]:
        """The names of choices at an end of their range. A scale of 0 is no boundary: nothing lies beyond it."""
        choices = (
            ("variance_scale", self.variance_scale, self.grid.variance_scales),
            (self.second_name, self.noise_or_temperature, self.grid.noise_or_temperature(self.kind)),
        )
        return tuple(name for name, value, tried in choices if _is_boundary(value, tried))

    def apply(self, prediction: Prediction) -> Prediction:
        """Return a prediction with its variance scaled, and its logits divided or its σ multiplied.

        Args:
            prediction: a prediction of the same kind, not calibrated.

        Returns:
            The calibrated prediction.

        Raises:
            OptionError: for a prediction of another kind.
        """
        if prediction.kind != self.kind:
            raise OptionError(
                f"a {self.kind} prediction", received=prediction.kind, remedy="calibrate predictions of this kind."
            )
        return apply_calibration(prediction, self.variance_scale, self.noise_or_temperature)

    def chosen(self) -> TrialRecord:
        """Return the choice and its score by name, as in records."""
        return self._record(self.variance_scale, self.noise_or_temperature, self.score)

    def points(self) -> list[TrialRecord]:
        """Return every point of the grid with its score, and the choice if it lies between them."""
        locations = product(self.grid.variance_scales, self.grid.noise_or_temperature(self.kind))
        scores = self.scores.flatten().tolist()
        points = [self._record(*location, score) for location, score in zip(locations, scores, strict=True)]
        return [*points, self.chosen()] if self.refined else points

    def _record(self, variance_scale: float, noise_or_temperature: float, score: float) -> TrialRecord:
        second = noise_or_temperature if self.sigma is None else noise_or_temperature * self.sigma
        return {"variance_scale": variance_scale, self.second_name: second, "score": score}

    def _raise_absent(self, name: str) -> float:
        raise OptionError(f"{name}, which {self.kind} does not have", received=name, remedy=f"use {self.second_name}.")


def calibrate(
    predictions: Prediction | Sequence[Prediction],
    targets: Tensor | Sequence[Tensor],
    *,
    grid: CalibrationGrid = DEFAULT_GRID,
    score: Score = "nll",
    likelihood: Likelihood | None = None,
    refine: bool = True,
) -> Calibration:
    """Return the variance scale and the temperature (or noise factor) with the smallest score on held-out predictions.

    Every point of the grid is scored. With `refine`, a simplex search then looks between the neighbours of the best
    point. Only two numbers are fitted to all validation rows, by the same search for every method.

    Args:
        predictions: of M rows that no network was trained on, or a list of predictions of batches.
        targets: (M, ...), or a list of the targets of the same batches.
        grid: the values to try.
        score: "nll" (in nats), or a function of (prediction, targets) to a float, lower is better. Each call receives
            the predictions calibrated at one point.
        likelihood: needed if rows have several classes, of which some are ignored or shifted.
        refine: whether to search between the points of the grid.

    Returns:
        The calibration; `calibration.apply(prediction)` uses it.

    Raises:
        DataError: for predictions and targets of different numbers of rows, or a score that is NaN.
        OptionError: for a score that is neither "nll" nor a function.

    Warns:
        TuningBoundaryWarning: if the choice is at an end of its range.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators import LinearizedLaplace
        >>> _ = torch.manual_seed(0)
        >>> estimator = LinearizedLaplace(nn.Linear(3, 1), "regression")
        >>> estimator = estimator.fit([(torch.randn(20, 3), torch.randn(20, 1))])
        >>> x, y = torch.randn(50, 3), torch.randn(50, 1)
        >>> calibration = calibrate(estimator.predict(x), y)
        >>> calibration.apply(estimator.predict(x)).total_variance.shape
        torch.Size([50, 1])
    """
    rows = ValidationPredictions.of(predictions, targets)
    found = calibrate_predictions(rows, grid, Scorer(score, likelihood), refine=refine)
    warn_at_boundary(found.at_boundary, found.chosen())
    return found


def shrinkage_of_few_rows(kind: str) -> float:
    """Return the weight w of the penalty w (log t)² that `fit(val_loader=)` and the comparison tune with.

    Args:
        kind: the kind of the likelihood, such as "classification".

    Returns:
        w in nats: 1 / (2 log² 1.5) for a softmax temperature t, 1 / (2 log² 2) for a noise factor.
    """
    factor = _NORMAL_NOISE if kind == "regression" else _NORMAL_TEMPERATURE
    return 1 / (2 * math.log(factor) ** 2)


def calibrate_predictions(
    rows: ValidationPredictions, grid: CalibrationGrid, scorer: Scorer, *, refine: bool, shrinkage: float = 0.0
) -> Calibration:
    """Return the best calibration of validation predictions, without a warning at a boundary.

    With `refine`, the best point with scale 0 is refined too, since the search in logarithms does not reach 0. The
    network without variance, at its best temperature or noise, is a candidate of every method.

    With `shrinkage` w > 0, the score has a penalty w (log t)² / M for a temperature or noise factor t and M rows: the
    negative logarithm of a normal prior on log t. If all M rows are classified correctly, the score alone has no
    minimum in t.
    """

    def score(variance_scale: float, noise_or_temperature: float) -> float:
        penalty = shrinkage * math.log(noise_or_temperature) ** 2 / rows.n_rows
        return rows.score(scorer, variance_scale, noise_or_temperature) + penalty

    axes = grid.variance_scales, grid.noise_or_temperature(rows.kind)
    locations = list(product(*axes))
    scores = [score(*location) for location in locations]
    best = min(range(len(locations)), key=lambda i: (scores[i], *map(_distance_from_one, locations[i])))
    found = Optimum(locations[best], scores[best])
    if refine:
        starts = [found]
        without_variance = [i for i, location in enumerate(locations) if location[0] == 0]
        if without_variance and found.location[0] > 0:
            i = min(without_variance, key=lambda i: (scores[i], _distance_from_one(locations[i][1])))
            starts.append(Optimum(locations[i], scores[i]))
        found = _best_refined(score, starts, axes)
    return Calibration(
        rows.kind,
        grid,
        torch.tensor(scores, dtype=torch.float64).reshape(*map(len, axes)),
        variance_scale=found.location[0],
        noise_or_temperature=found.location[1],
        score=found.score,
        score_name=f"penalized {scorer.name}" if shrinkage else scorer.name,
        sigma=rows.sigma_noise,
        evaluations=found.evaluations,
    )


def _best_refined(score: Callable[..., float], starts: list[Optimum], axes: tuple[Sequence[float], ...]) -> Optimum:
    """Refine around every start, and return the best result, the first of equal ones, with all evaluations."""
    refined = [refine_between_neighbours(score, start, axes) for start in starts]
    best = min(refined, key=lambda optimum: optimum.score)
    return replace(best, evaluations=sum(optimum.evaluations for optimum in refined))


def warn_at_boundary(names: Sequence[str], values: Mapping[str, Any]) -> None:
    """Warn with TuningBoundaryWarning if any choice is at an end of its range."""
    if names:
        listed = ", ".join(f"{name}={values[name]:.4g}" for name in names)
        warnings.warn(
            f"tuning ended at the last value of a range: {listed}. Try values beyond it, or more validation rows.",
            TuningBoundaryWarning,
            stacklevel=3,
        )


def _distance_from_one(factor: float) -> float:
    return abs(math.log(factor)) if factor > 0 else math.inf


def _is_boundary(value: float, tried: Sequence[float]) -> bool:
    ends = [end for end in (tried[0], tried[-1]) if end > 0]
    return len(tried) > 1 and any(math.isclose(value, end, rel_tol=1e-3) for end in ends)
