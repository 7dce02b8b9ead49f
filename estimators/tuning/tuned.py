"""The result of tuning: the estimator and calibration to use, and all trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from estimators.errors import OptionError
from estimators.estimator.base import UncertaintyEstimator
from estimators.likelihoods.prediction import Prediction
from estimators.numerics.pytrees import PyTree
from estimators.persistence.state import FittedState, read_file, write_file
from estimators.tuning.calibration import Calibration, TrialRecord
from estimators.tuning.stored import decode_tuning, encode_tuning
from estimators.tuning.trials import ScoreGrid, Trial
from estimators.tuning.tuned_option import TunedOption, is_number

__all__ = ["Tuned", "record_calibration"]

E = TypeVar("E", bound=UncertaintyEstimator)


@dataclass(frozen=True)
class Tuned(Generic[E]):
    """A tuned estimator with its calibration and all trials, as `tune` returns it.

    `predict` applies the calibration. `save` writes everything to one file, and `Tuned.load` reads it.
    `tuned.estimator.save` writes the fit without the calibration, and warns.

    Attributes:
        estimator: the chosen fit.
        calibration: the calibration to apply to its predictions.
        option: the option that was tuned.
        trials: one trial per value, in the order of the values.
        chosen: the chosen trial.
        seconds: wall-clock time of all fits, predictions and scores.
        validation_rows: the number of validation rows.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from estimators import LinearizedLaplace, tune
        >>> model, x = nn.Linear(3, 1), torch.randn(50, 3)
        >>> estimator = LinearizedLaplace(model, "regression").fit([(x, torch.randn(50, 1))])
        >>> tuned = tune(estimator, [(x, torch.randn(50, 1))], option=None)
        >>> tuned.save("tuned.safetensors")
        >>> again = Tuned.load("tuned.safetensors", LinearizedLaplace(model, "regression"))
        >>> torch.equal(again.predict(x).total_variance, tuned.predict(x).total_variance)
        True
    """

    estimator: E
    calibration: Calibration
    option: TunedOption
    trials: tuple[Trial, ...]
    chosen: Trial
    seconds: float
    validation_rows: int

    def predict(self, x: PyTree) -> Prediction:
        """Return the calibrated predictive distribution.

        Args:
            x: M query rows.

        Returns:
            The prediction of the tuned estimator, calibrated.
        """
        return self.calibration.apply(self.estimator.predict(x))

    def export(self, path: str | Path, example: PyTree) -> None:
        """Write a module that returns the calibrated predictive distribution to a file that torch alone loads.

        Args:
            path: the file, whose name ends in ".pt2".
            example: a query of at least one row, as for `predict`.

        Raises:
            UnsupportedError, ModelError, OptionError: as `UncertaintyEstimator.export`.
        """
        self.estimator._export(path, example, self.predict, self.calibration.apply)

    def state_dict(self) -> FittedState:
        """Return the fit, its calibration and all trials as a flat dict of tensors and JSON texts."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "estimator"}
        return {**self.estimator._fitted_state(), **encode_tuning(**values)}

    def save(self, path: str | Path) -> None:
        """Write the fit, its calibration and all trials to one safetensors file. An interrupted write leaves no file.

        Args:
            path: the file to write.
        """
        write_file(self.state_dict(), path)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor | str], estimator: E) -> Tuned[E]:
        """Return the tuned estimator whose `state_dict` is `state`.

        Args:
            state: the result of `state_dict`.
            estimator: an estimator as for `load`.

        Returns:
            The tuned estimator, a new object.

        Raises:
            StateError: for the state of a fit that was not tuned, of other options, or of another estimator.
            ModelChangedError: for another model.
        """
        fitted, values = decode_tuning(state, estimator)
        tuned = cls(fitted, **values)
        record_calibration(fitted, tuned.calibration)
        return tuned

    @classmethod
    def load(cls, path: str | Path, estimator: E) -> Tuned[E]:
        """Return the tuned estimator in a file that `save` wrote. Its predictions are bit for bit the saved ones.

        Args:
            path: the file.
            estimator: an estimator on the same model with the options of the tuned one; it is not changed. Its value
                of the tuned option does not matter, since the file contains the chosen value. Only if the option is an
                object, such as a solver, must the estimator have the chosen one.

        Returns:
            The tuned estimator, a new object.

        Raises:
            StateError: for the file of a fit that was not tuned, of other options, or of another estimator.
            ModelChangedError: for another model.
            FileNotFoundError: if there is no such file.

        """
        return cls.from_state_dict(read_file(path), estimator)

    @property
    def value(self) -> Any:  # noqa: ANN401
        """The chosen value of the option."""
        return self.chosen.value

    @property
    def fits(self) -> int:
        """The number of fits that tuning made, without the given one."""
        return sum(trial.refitted for trial in self.trials)

    @property
    def passes(self) -> float:
        """The forward and backward passes over the training rows of all trials."""
        return math.fsum(trial.passes for trial in self.trials)

    @property
    def refit_kind(self) -> str:
        """How the fits were made: "with retraining" or "post hoc at fixed weights"."""
        return "with retraining" if self.estimator.retrains else "post hoc at fixed weights"

    @property
    def at_boundary(self) -> tuple[str, ...]:
        """The names of choices at an end of their range. Values of the option whose fits failed are left out."""
        return (*self._option_at_boundary(), *self.calibration.at_boundary)

    @property
    def chosen_values(self) -> dict[str, Any]:
        """The chosen value of the option and the chosen calibration by name, with their score."""
        chosen = {} if self.option.name is None else {self.option.name: self.value}
        return {**chosen, **self.calibration.chosen()}

    def _option_at_boundary(self) -> Sequence[str]:
        usable = [trial for trial in self.trials if trial.score is not None and is_number(trial.value)]
        worse = any(trial.score != self.chosen.score for trial in usable)
        if self.option.name is None or not worse or self.chosen.value not in (usable[0].value, usable[-1].value):
            return ()
        return (self.option.name,)

    def score_grid(self, *, noise_or_temperature: float | None = 1.0) -> ScoreGrid:
        """Return the scores over values of the option and variance scales.

        With the option "solver.lam" this is Figure 4 of McInerney and Kallus (2025).

        Args:
            noise_or_temperature: the factor of σ or the softmax temperature of the scores, a value of its grid. None:
                the best of them at each point.

        Returns:
            The scores (A, B) of A values and B variance scales.

        Raises:
            OptionError: for a `noise_or_temperature` that was not tried, and if no value of the option is a number.
        """
        trials = [trial for trial in self.trials if trial.calibration is not None and is_number(trial.value)]
        if not trials:
            raise OptionError(
                "an option with numeric values", received=repr(self.option.name), remedy="tune over numbers."
            )
        grid = self.calibration.grid
        tried = grid.noise_or_temperature(self.calibration.kind)
        if noise_or_temperature is not None and noise_or_temperature not in tried:
            raise OptionError(
                f"noise_or_temperature among {tried}, or None",
                received=repr(noise_or_temperature),
                remedy="1, or None.",
            )
        every = torch.stack([trial.calibration.scores for trial in trials if trial.calibration is not None])
        scores = every.amin(-1) if noise_or_temperature is None else every[..., tried.index(noise_or_temperature)]
        return ScoreGrid(tuple(float(trial.value) for trial in trials), grid.variance_scales, scores)

    def to_dict(self) -> dict[str, Any]:
        """Return every point of every grid, the choice and the cost in JSON types, rounded to eight digits."""
        chosen = {"value": self.value, **self.calibration.chosen()}
        return {
            "option": self.option.name,
            "unit": self.option.unit,
            "points": [record for trial in self.trials for record in self._records(trial)],
            "chosen": _rounded(chosen),
            "at_boundary": list(self.at_boundary),
            "refined": self.calibration.refined,
            "failures": {str(trial.value): trial.failure for trial in self.trials if trial.failure is not None},
            "seconds": self.seconds,
            "fits": self.fits,
            "passes": self.passes,
            "score_name": self.calibration.score_name,
            "validation_rows": self.validation_rows,
            "refit_kind": self.refit_kind,
        }

    def _records(self, trial: Trial) -> list[TrialRecord]:
        if trial.calibration is None:
            return [_rounded({"value": trial.value, **dict.fromkeys(self.calibration.chosen())})]
        return [_rounded({"value": trial.value, **record}) for record in trial.calibration.points()]


def record_calibration(estimator: UncertaintyEstimator, calibration: Calibration) -> None:
    """Record a calibration in a fit, so that saving the fit without it warns."""
    if (calibration.variance_scale, calibration.noise_or_temperature) != (1.0, 1.0):
        chosen = {name: value for name, value in calibration.chosen().items() if name != "score"}
        estimator._calibrated_by = ", ".join(f"{name}={value:.4g}" for name, value in chosen.items())


def _rounded(record: dict[str, Any]) -> TrialRecord:
    return {name: float(f"{value:.8g}") if is_number(value) else None for name, value in record.items()}
