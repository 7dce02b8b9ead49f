"""The result of tuning: the estimator and calibration to use, and all trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from estimators.calibration.calibration import Calibration
from estimators.calibration.record import CalibrationRecord
from estimators.calibration.stored import Described, belongs_to_record, decode_record, encode_record
from estimators.calibration.tuned_option import TunedOption
from estimators.errors import OptionError, StateError
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.cloning import clone
from estimators.likelihoods import Likelihood
from estimators.likelihoods.prediction import Prediction
from estimators.numerics.pytrees import PyTree
from estimators.persistence.option_values import described, in_words
from estimators.persistence.state import TUNING, FittedState, read_file, write_file

__all__ = ["Tuned", "record_calibration"]

E = TypeVar("E", bound=UncertaintyEstimator)


@dataclass(frozen=True, repr=False)
class Tuned(CalibrationRecord, Generic[E]):
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

    @property
    def likelihood(self) -> Likelihood:
        """The likelihood of the estimator."""
        return self.estimator.likelihood

    def predict(self, x: PyTree) -> Prediction:
        """Return the calibrated predictive distribution.

        Args:
            x: M query rows.

        Returns:
            The prediction of the tuned estimator, calibrated, in the units of the targets.
        """
        return self.estimator.likelihood.to_target_units(self.predict_standardized(x))

    def predict_standardized(self, x: PyTree) -> Prediction:
        """Return the calibrated predictive distribution in the units of the network's outputs.

        Args:
            x: M query rows.

        Returns:
            The prediction. It differs from that of `predict` only for a Gaussian with `target_shift` or `target_scale`.
        """
        return self.calibration.apply(self.estimator.predict_uncalibrated(x))

    def export(self, path: str | Path, example: PyTree) -> None:
        """Write a module that returns the calibrated predictive distribution to a file that torch alone loads.

        Args:
            path: the file, whose name ends in ".pt2".
            example: a query of at least one row, as for `predict`.

        Raises:
            UnsupportedError, ModelError, OptionError: as `UncertaintyEstimator.export`.
        """
        to_units = self.estimator.likelihood.to_target_units
        self.estimator._export(path, example, self.predict, lambda made: to_units(self.calibration.apply(made)))

    def state_dict(self) -> FittedState:
        """Return the fit, its calibration and all trials as a flat dict of tensors and JSON texts."""
        return {**self.estimator._fitted_state(), **encode_record(self, TUNING)}

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
        if not isinstance(state.get(TUNING), str):
            raise StateError(
                "the state of a tuned estimator, from Tuned.save()",
                received="that of a fit which was not tuned",
                remedy="estimator.load(path).",
            )
        record, chosen = decode_record(state, TUNING)
        fit = {name: value for name, value in state.items() if not belongs_to_record(name, TUNING)}
        fitted = clone_with_value(estimator, record.option, chosen).load_state_dict(fit)
        record_calibration(fitted, record.calibration)
        return cls(**vars(record), estimator=fitted)

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
    def refit_kind(self) -> str:
        """How the fits were made: "with retraining" or "post hoc at fixed weights"."""
        return "with retraining" if self.estimator.retrains else "post hoc at fixed weights"

    def to_dict(self) -> dict[str, Any]:
        """Return every point of every grid, the choice and the cost in JSON types, rounded to eight digits."""
        return {**super().to_dict(), "refit_kind": self.refit_kind}


def record_calibration(estimator: UncertaintyEstimator, calibration: Calibration) -> None:
    """Record a calibration in a fit, so that saving the fit without it warns."""
    if (calibration.variance_scale, calibration.noise_or_temperature) != (1.0, 1.0):
        chosen = {name: value for name, value in calibration.chosen().items() if name != "score"}
        estimator._calibrated_by = ", ".join(f"{name}={value:.4g}" for name, value in chosen.items())


def clone_with_value(estimator: E, option: TunedOption, value: Any) -> E:  # noqa: ANN401
    """Return a new estimator with this value of the tuned option, not fitted. Raises StateError if that fails."""
    changed: dict[str, Any] = {}
    if isinstance(value, Described):
        given = option.value_of(estimator)
        if described(given) != value.description:
            chosen = in_words(value.description)
            raise StateError(
                f"an estimator with the chosen {option.name}, {chosen}, an object that a file cannot contain",
                received=in_words(described(given)),
                remedy=f"construct the estimator with this {option.name}.",
            )
    elif option.name is not None:
        changed = option.as_options(estimator, value)
    try:
        made: E = clone(estimator, changed)
    except OptionError as error:
        raise StateError(
            f"an estimator with the option that was tuned, {option.name}",
            received=f"a {type(estimator).__name__}: {error.received}",
            remedy="load it into the estimator that was tuned.",
        ) from error
    return made
