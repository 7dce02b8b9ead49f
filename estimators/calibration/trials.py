"""The fits that tuning tried, and their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from estimators.calibration.calibration import Calibration

__all__ = ["ScoreGrid", "Trial"]


@dataclass(frozen=True)
class Trial:
    """One value of the tuned option: the best calibration of the fit with it, and its cost.

    Attributes:
        value: the value of the option; None if no option is tuned.
        calibration: the best calibration of this fit; None if the fit failed (an indefinite Hessian, a refit that
            diverged).
        passes: forward and backward passes over the training rows, including predictions of the validation rows.
        seconds: wall-clock time of fit, predictions and scores.
        refitted: False for the fit that was passed in.
        failure: the error of a fit that failed, else None.
    """

    value: Any
    calibration: Calibration | None
    passes: float = 0.0
    seconds: float = 0.0
    refitted: bool = True
    failure: str | None = None

    @property
    def score(self) -> float | None:
        """The smallest score with this value; None if the fit failed."""
        return None if self.calibration is None else self.calibration.score


@dataclass(frozen=True, repr=False)
class ScoreGrid:
    """Scores over the values of the tuned option and the variance scales. Fits that failed are left out.

    Attributes:
        values: the A values of the option.
        variance_scales: the B factors of the epistemic variance.
        scores: (A, B), lower is better, without NaN.
    """

    values: tuple[float, ...]
    variance_scales: tuple[float, ...]
    scores: Tensor

    def __repr__(self) -> str:
        """Return the shape and the smallest score."""
        shape, least = tuple(self.scores.shape), float(self.scores.min())
        return f"ScoreGrid({shape[0]} values and {shape[1]} variance scales, smallest score {least:.4g})"
