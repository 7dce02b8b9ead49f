"""The fits that tuning tried, and their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from estimators.tuning.calibration import Calibration

__all__ = ["Point", "ScoreGrid"]


@dataclass(frozen=True)
class Point:
    """One value of the axis: the best calibration of the fit there, and what it took.

    `passes` are forward and backward over the training rows, queries at the validation rows included; `refitted` is
    False for the fit that was given. A fit that failed (an indefinite Hessian, a refit that diverged) has no
    calibration, and says why in `failure`.
    """

    value: Any
    calibration: Calibration | None
    passes: float = 0.0
    seconds: float = 0.0
    refitted: bool = True
    failure: str | None = None

    @property
    def score(self) -> float | None:
        """The least one at this value, None for a fit that failed."""
        return None if self.calibration is None else self.calibration.score


@dataclass(frozen=True)
class ScoreGrid:
    """Scores over two axes: `scores` (values, variance scales); NaN-free, since fits that failed are left out."""

    values: tuple[float, ...]
    variance_scales: tuple[float, ...]
    scores: Tensor
