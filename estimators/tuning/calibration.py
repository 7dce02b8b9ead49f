"""Calibration of stored predictions: a scale of the variance, and a softmax temperature or a noise. No refit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from estimators.errors import OptionError, TuningEdgeWarning
from estimators.likelihoods import Likelihood
from estimators.likelihoods.prediction import Prediction
from estimators.tuning.grid import DEFAULT_GRID, CalibrationGrid
from estimators.tuning.refinement import Optimum, between_neighbours
from estimators.tuning.scores import Score, Scorer
from estimators.tuning.validation import Predicted, applied

__all__ = ["Calibration", "calibrate", "calibrated_on", "warn_of_edges"]

PointRecord = dict[str, float | None]


@dataclass(frozen=True)
class Calibration:
    """The calibration of a kind of prediction that had the least score, and every score that it was chosen by.

    `variance_scale` multiplies the epistemic variance. `other` is the softmax temperature or, for regression, the
    factor of σ, `sigma` being σ without it. `scores` (scales, others) is the whole grid. Of equal scores the one
    nearest to no change is taken. `evaluations` counts what refining the best point added to the grid; `refined` says
    whether it found a better one between the neighbours, which is then the one chosen.
    """

    kind: str
    grid: CalibrationGrid
    scores: Tensor
    variance_scale: float = 1.0
    other: float = 1.0
    score: float = math.inf
    score_name: str = "NLL"
    sigma: float | None = None
    evaluations: int = 0

    @property
    def refined(self) -> bool:
        """Whether the choice lies between points of the grid."""
        return not (self.variance_scale in self.grid.variance_scales and self.other in self.grid.others(self.kind))

    @property
    def other_name(self) -> str:
        """Of the second axis, as records have it."""
        return "sigma_noise" if self.kind == "regression" else "softmax_temperature"

    @property
    def softmax_temperature(self) -> float:
        """Errors: OptionError for regression."""
        return self.other if self.kind != "regression" else self._absent("softmax_temperature")

    @property
    def sigma_noise(self) -> float:
        """σ as it is to be, the geometric mean where outputs have one each. Errors: OptionError but for regression."""
        return self._absent("sigma_noise") if self.sigma is None else self.sigma * self.other

    @property
    def at_edge(self) -> tuple[str, ...]:
        """What was chosen at an end of its range. A scale of 0 is none: there is nothing beyond it."""
        edges = (("variance_scale", self.variance_scale, self.grid.variance_scales),
                 (self.other_name, self.other, self.grid.others(self.kind)))  # fmt: skip
        return tuple(name for name, value, axis in edges if _is_end(value, axis))

    def apply(self, prediction: Prediction) -> Prediction:
        """A prediction of the same kind, calibrated. Errors: OptionError for another kind."""
        if prediction.kind != self.kind:
            raise OptionError(f"a {self.kind} prediction", received=prediction.kind, remedy="calibrate it by its own.")
        return applied(prediction, self.variance_scale, self.other)

    def chosen(self) -> PointRecord:
        """The choice, under the names of records."""
        return self._record(self.variance_scale, self.other, self.score)

    def points(self) -> list[PointRecord]:
        """Every point of the grid, and the choice where it lies between them."""
        places = product(self.grid.variance_scales, self.grid.others(self.kind))
        scores = self.scores.flatten().tolist()
        points = [self._record(*place, score) for place, score in zip(places, scores, strict=True)]
        return [*points, self.chosen()] if self.refined else points

    def _record(self, variance_scale: float, other: float, score: float) -> PointRecord:
        shown = other if self.sigma is None else other * self.sigma
        return {"variance_scale": variance_scale, self.other_name: shown, "score": score}

    def _absent(self, name: str) -> float:
        raise OptionError(f"{name}, which {self.kind} does not have", received=name, remedy=f"{self.other_name}.")


def calibrate(
    predictions: Prediction | Sequence[Prediction],
    targets: Tensor | Sequence[Tensor],
    *,
    grid: CalibrationGrid = DEFAULT_GRID,
    score: Score = "nll",
    likelihood: Likelihood | None = None,
    refine: bool = True,
) -> Calibration:
    """The scale and the temperature (or noise) with the least score on predictions of rows that were not trained on.

    Every point of the grid is scored; then, with `refine`, a simplex search between the neighbours of the best. That is
    as honest as the grid: two numbers for all validation rows, the same search for every method, and `refined` says so.

    Args:
        predictions: of M rows, or of batches of them.
        targets: likewise.
        grid: what is tried.
        score: "nll", or a function of (prediction, targets), lower is better; each call is given the predictions as
            they are at one point, and nothing is carried over.
        likelihood: where rows have several classes, of which some are ignored or shifted.
        refine: whether to look between the points.

    Warns: TuningEdgeWarning where the choice is the last of its range.
    """
    found = calibrated_on(Predicted.of(predictions, targets), grid, Scorer(score, likelihood), refine=refine)
    warn_of_edges(found.at_edge, found.chosen())
    return found


def calibrated_on(rows: Predicted, grid: CalibrationGrid, scorer: Scorer, *, refine: bool) -> Calibration:
    """`calibrate`, without the warning."""
    axes = grid.variance_scales, grid.others(rows.kind)
    places = list(product(*axes))
    scores = [rows.score(scorer, *place) for place in places]
    best = min(range(len(places)), key=lambda i: (scores[i], *map(_change, places[i])))
    found = Optimum(places[best], scores[best])
    if refine:
        found = between_neighbours(lambda *place: rows.score(scorer, *place), found, axes)
    return Calibration(
        rows.kind,
        grid,
        torch.tensor(scores, dtype=torch.float64).reshape(*map(len, axes)),
        variance_scale=found.place[0],
        other=found.place[1],
        score=found.score,
        score_name=scorer.name,
        sigma=rows.sigma_noise,
        evaluations=found.evaluations,
    )


def warn_of_edges(names: Sequence[str], values: Mapping[str, Any]) -> None:
    """TuningEdgeWarning for those."""
    if names:
        listed = ", ".join(f"{name}={values[name]:.4g}" for name in names)
        warnings.warn(
            f"tuning ended at the last value of a range: {listed}. Try values beyond it, or more validation rows.",
            TuningEdgeWarning,
            stacklevel=3,
        )


def _change(factor: float) -> float:
    return abs(math.log(factor)) if factor > 0 else math.inf


def _is_end(value: float, axis: Sequence[float]) -> bool:
    ends = [end for end in (axis[0], axis[-1]) if end > 0]
    return len(axis) > 1 and any(math.isclose(value, end, rel_tol=1e-3) for end in ends)
