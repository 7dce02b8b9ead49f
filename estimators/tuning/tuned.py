"""What tuning gives: the estimator and calibration to use, and everything that was tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from estimators.errors import OptionError
from estimators.estimator.base import UncertaintyEstimator
from estimators.likelihoods.prediction import Prediction
from estimators.numerics.pytrees import PyTree
from estimators.persistence.state import FittedState, read_file, write_file
from estimators.tuning.calibration import Calibration, PointRecord
from estimators.tuning.stored import StoredTuning, as_tuned, stored_tuning
from estimators.tuning.trials import Point, ScoreGrid
from estimators.tuning.tuned_option import TunedOption, is_number

__all__ = ["Tuned", "mark_tuned"]

E = TypeVar("E", bound=UncertaintyEstimator)


@dataclass(frozen=True)
class Tuned(Generic[E]):
    """The outcome. `estimator` is fitted, `calibration` is to be applied to what it predicts: `predict` does both.

    `save` writes all of it to one file and `Tuned.load` reads it. `estimator.save` alone leaves the calibration out,
    and warns of it.

    `curve` has a point for each value of the axis, in the order of the values. `at_edge` names what was chosen at an
    end of its range. `seconds` are of everything: fits, predictions, scores.
    """

    estimator: E
    calibration: Calibration
    axis: TunedOption
    curve: tuple[Point, ...]
    chosen: Point
    seconds: float
    validation_rows: int

    def predict(self, x: PyTree) -> Prediction:
        """Predictive distribution of the tuned estimator, calibrated."""
        return self.calibration.apply(self.estimator.predict(x))

    def state_dict(self) -> FittedState:
        """Return the fit, its calibration and the table of tuning as a flat dict of tensors and JSON texts."""
        stored = StoredTuning(
            self.calibration, self.axis, self.curve, self._index(), self.seconds, self.validation_rows
        )
        return {**self.estimator._fitted_state(), **stored_tuning(stored)}

    def save(self, path: str | Path) -> None:
        """Write the tuned estimator to one safetensors file, whole or not at all: fit, calibration, table of tuning."""
        write_file(self.state_dict(), path)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor | str], estimator: E) -> Tuned[E]:
        """Return what `state_dict` was called on; see `load`."""
        fitted, stored = as_tuned(state, estimator)
        tuned = cls(
            fitted,
            stored.calibration,
            stored.axis,
            stored.curve,
            stored.curve[stored.chosen],
            stored.seconds,
            stored.validation_rows,
        )
        mark_tuned(fitted, stored.calibration)
        return tuned

    @classmethod
    def load(cls, path: str | Path, estimator: E) -> Tuned[E]:
        """Return the tuned estimator in a file that `save` wrote; its predictions are those before, bit for bit.

        Args:
            path: the file.
            estimator: constructed with the options of the one that was tuned, on the same model. It stays as it is,
                and its value of the tuned option does not matter: the chosen one is in the file. Only a tuned option
                that is an object, such as a solver, must be the chosen one.

        Raises:
            StateError: for the file of a fit that was not tuned, of other options, or of another estimator.
            ModelChangedError: for another model.
            FileNotFoundError: for no file.

        Example:
            >>> tuned = tune(RegVar(model, "regression").fit(train), validation)
            >>> tuned.save("tuned.safetensors")
            >>> again = Tuned.load("tuned.safetensors", RegVar(model, "regression"))
        """
        return cls.from_state_dict(read_file(path), estimator)

    def _index(self) -> int:
        """The place of the chosen point among the tried."""
        return next(i for i, point in enumerate(self.curve) if point is self.chosen)

    @property
    def value(self) -> Any:  # noqa: ANN401
        """The one chosen on the axis."""
        return self.chosen.value

    @property
    def fits(self) -> int:
        """How many were made for tuning; the given one is not among them."""
        return sum(point.refitted for point in self.curve)

    @property
    def passes(self) -> float:
        """Of all points."""
        return math.fsum(point.passes for point in self.curve)

    @property
    def where(self) -> str:
        """How the fits of the axis came about."""
        return "with retraining" if self.estimator.retrains else "post hoc at fixed weights"

    @property
    def at_edge(self) -> tuple[str, ...]:
        """What was chosen at an end of its range; on the axis, of the values whose fits did not fail."""
        return (*self._axis_edge(), *self.calibration.at_edge)

    @property
    def places(self) -> dict[str, Any]:
        """What was chosen on the axis and of the calibration, by name, with its score."""
        return {**({} if self.axis.name is None else {self.axis.name: self.value}), **self.calibration.chosen()}

    def _axis_edge(self) -> Sequence[str]:
        usable = [point for point in self.curve if point.score is not None and is_number(point.value)]
        worse = any(point.score != self.chosen.score for point in usable)
        if self.axis.name is None or not worse or self.chosen.value not in (usable[0].value, usable[-1].value):
            return ()
        return (self.axis.name,)

    def surface(self, *, other: float | None = 1.0) -> ScoreGrid:
        """The score over values of the axis × variance scales: the paper's Figure 4, where the axis is solver.lam.

        `other` is the softmax temperature or factor of σ to look at, a value of its grid; None: the best at each point.

        Errors: OptionError for an `other` that was not tried, and where no value is a number.
        """
        points = [point for point in self.curve if point.calibration is not None and is_number(point.value)]
        if not points:
            raise OptionError("an axis of numbers", received=repr(self.axis.name), remedy="values of numbers.")
        grid = self.calibration.grid
        others = grid.others(self.calibration.kind)
        if other is not None and other not in others:
            raise OptionError(f"other among {others}, or None", received=repr(other), remedy="1, or None.")
        tried = torch.stack([point.calibration.scores for point in points if point.calibration is not None])
        scores = tried.amin(-1) if other is None else tried[..., others.index(other)]
        return ScoreGrid(tuple(float(point.value) for point in points), grid.variance_scales, scores)

    def to_dict(self) -> dict[str, Any]:
        """In JSON types, as records have it: every point of every grid, what was chosen, the cost. Eight digits."""
        chosen = {"value": self.value, **self.calibration.chosen()}
        return {
            "axis": self.axis.name,
            "unit": self.axis.unit,
            "points": [record for point in self.curve for record in self._records(point)],
            "chosen": _rounded(chosen),
            "at_edge": list(self.at_edge),
            "refined": self.calibration.refined,
            "failures": {str(point.value): point.failure for point in self.curve if point.failure is not None},
            "seconds": self.seconds,
            "fits": self.fits,
            "passes": self.passes,
            "score_name": self.calibration.score_name,
            "validation_rows": self.validation_rows,
            "where": self.where,
        }

    def _records(self, point: Point) -> list[PointRecord]:
        if point.calibration is None:
            return [_rounded({"value": point.value, **dict.fromkeys(self.calibration.chosen())})]
        return [_rounded({"value": point.value, **record}) for record in point.calibration.points()]


def mark_tuned(estimator: UncertaintyEstimator, calibration: Calibration) -> None:
    """Let a fit know of a calibration, of which it warns where it is saved without."""
    if (calibration.variance_scale, calibration.other) != (1.0, 1.0):
        places = {name: value for name, value in calibration.chosen().items() if name != "score"}
        estimator._calibrated_by = ", ".join(f"{name}={value:.4g}" for name, value in places.items())


def _rounded(record: dict[str, Any]) -> PointRecord:
    return {name: float(f"{value:.8g}") if is_number(value) else None for name, value in record.items()}
