"""Save a fit to a file and load it, without the training data."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from estimators.calibration.record import CalibrationRecord
from estimators.calibration.stored import belongs_to_record, decode_record, encode_record
from estimators.data.training_data import AbsentTrainingData, TrainingData
from estimators.errors import CalibrationNotSavedWarning, NotFittedError, StateError, UnsupportedError
from estimators.estimator.fit_report import FitReport
from estimators.estimator.options import constructor_options, stored_option
from estimators.likelihoods import Likelihood
from estimators.models.checks import check_model
from estimators.models.exclusive import exclusively
from estimators.models.network import Network
from estimators.models.self_check import DerivativeReport
from estimators.numerics.pytrees import RowLayout
from estimators.objective.objective import Objective, Prior
from estimators.option_checks import PriorOption
from estimators.persistence.option_values import described
from estimators.persistence.state import (
    ABOUT,
    CALIBRATION,
    TUNING,
    About,
    FittedState,
    Learned,
    model_digest,
    read_file,
    write_file,
)
from estimators.persistence.weight_checksum import WeightChecksum, check_unchanged, weight_checksum
from estimators.runtime.rng import preserved_random_state

__all__ = ["SavingMixin"]

_PASSES = "fit_passes"
"""The entry of a saved fit with the passes of its report."""


class SavingMixin(ABC):
    """`save` and `load` of a fit: its objective, and the tensors and JSON values that the method computed.

    A subclass implements `_get_fit_state` and `_set_fit_state`.
    """

    not_compared: ClassVar[frozenset[str]] = frozenset()
    """Options that do not affect the fit or cannot be compared. A saved fit may be loaded with other values of them."""

    counts_passes: ClassVar[bool] = True
    """Whether `passes_` counts all passes of a fit; False if another package runs the network."""

    model: nn.Module
    likelihood: Likelihood
    prior_precision: PriorOption
    calibration_: CalibrationRecord | None = None
    """What `fit` chose on its validation rows, with every score; None without validation rows."""
    objective_: Objective
    weight_checksum_: WeightChecksum
    fit_report_: FitReport
    _warned: bool = False
    _calibrated_by: str | None = None
    """The calibration that tuning chose for the predictions, in words; it is not a part of the fit."""

    @exclusively
    def state_dict(self) -> FittedState:
        """Return the fit as a flat dict of tensors, with a JSON text under "about".

        The model is represented only by its checksum.

        Returns:
            The state, for `load_state_dict`.

        Raises:
            NotFittedError: before `fit`.
            UnsupportedError: if this estimator cannot be saved.
            ModelChangedError: if the model has changed since the fit.

        Warns:
            CalibrationNotSavedWarning: if tuning chose a calibration, which is not part of the fit.
        """
        if self._calibrated_by is not None:
            warnings.warn(
                f"a tuned fit is saved without its calibration, {self._calibrated_by}: save the result of tune with "
                "tuned.save(path), and load it with Tuned.load(path, estimator)",
                CalibrationNotSavedWarning,
                stacklevel=2,
            )
        return self._fitted_state()

    def _fitted_state(self) -> FittedState:
        """Return `state_dict` without its warning."""
        self._check_fitted()
        check_unchanged(self.model, self.weight_checksum_, self.network_.params)
        tensors, learned = self._get_fit_state()
        if type(self.fit_report_) is FitReport:
            learned = {**learned, _PASSES: self.fit_report_.passes}
        calibration = {} if self.calibration_ is None else encode_record(self.calibration_, CALIBRATION)
        return {**tensors, **calibration, ABOUT: self._about(self.objective_, learned).to_json()}

    @exclusively
    def load_state_dict(self, state: Mapping[str, Tensor | str]) -> Self:
        """Load a fit into this estimator, which has the same options and model, on any device. No data are needed.

        Args:
            state: the result of `state_dict`.

        Returns:
            This estimator, fitted.

        Raises:
            StateError: for the state of another estimator or other options.
            ModelChangedError: for the state of another model.
        """
        check_model(self.model)
        about = About.of(state)
        _check_untuned(state)
        about.check(type(self).__name__, self._described_options(), model_digest(self.model))
        network = Network(self.model, about.parameters)
        network.check.report = DerivativeReport(**about.derivatives)
        layout = RowLayout(frozenset(about.shared_inputs))
        objective = self._make_objective(
            network, AbsentTrainingData((), about.n_data, checksum=about.checksum, layout=layout)
        )
        calibration = decode_record(state, CALIBRATION)[0] if CALIBRATION in state else None
        if calibration is not None and calibration.option.name is not None:
            objective = replace(objective, prior=self._prior(network, calibration.value))
        self._load_fit_state(state, objective)
        self._set_fitted(objective, calibration)
        self.weight_checksum_ = weight_checksum(self.model, network.params)
        self._report_derivatives(objective)
        return self

    def _set_fitted(self, objective: Objective, calibration: CalibrationRecord | None) -> None:
        """Set what every fit has."""
        self.objective_, self.calibration_ = objective, calibration
        self._calibrated_by, self._warned = None, False

    def _report_passes(self, objective: Objective) -> None:
        """Set the passes of the fit in `fit_report_`, unless the estimator has its own class of reports."""
        if self.counts_passes and type(getattr(self, "fit_report_", FitReport())) is FitReport:
            self.fit_report_ = FitReport(passes=objective.network.pass_counter.passes(objective.batches.n_data, 1))

    def _report_derivatives(self, objective: Objective) -> None:
        """Add the comparisons with plain autograd to `fit_report_`."""
        report = objective.network.check.report
        fitted = getattr(self, "fit_report_", None)
        if fitted is None:
            self.fit_report_ = FitReport(derivatives=report)
        elif isinstance(fitted, FitReport):  # a custom estimator may have another report
            self.fit_report_ = replace(fitted, derivatives=report)

    def _load_fit_state(self, state: Mapping[str, Tensor | str], objective: Objective) -> None:
        """Load the learned part of a state that has been checked."""
        tensors = {name: t.to(objective.theta.device) for name, t in state.items() if isinstance(t, Tensor)}
        tensors = {name: t for name, t in tensors.items() if not belongs_to_record(name, CALIBRATION)}
        learned = About.of(state).finished()
        passes = learned.pop(_PASSES, None)
        self._set_fit_state(objective, tensors, learned)
        if passes is not None:
            self.fit_report_ = FitReport(passes=passes)

    def save(self, path: str | Path) -> None:
        """Write the fit to one safetensors file. An interrupted write leaves no file.

        Args:
            path: the file to write.

        Raises:
            NotFittedError, UnsupportedError, ModelChangedError: as `state_dict`.

        Warns:
            CalibrationNotSavedWarning: if tuning chose a calibration, which is not part of the fit.

        Example:
            >>> import tempfile, torch
            >>> from torch import nn
            >>> from estimators import LinearizedLaplace
            >>> model, x = nn.Linear(3, 2), torch.randn(8, 3)
            >>> fitted = LinearizedLaplace(model, "regression").fit([(x, torch.randn(8, 2))])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     fitted.save(f"{folder}/fit.safetensors")
            ...     loaded = LinearizedLaplace(model, "regression").load(f"{folder}/fit.safetensors")
            >>> torch.equal(loaded.variance(x), fitted.variance(x))
            True
        """
        write_file(self.state_dict(), path)

    def load(self, path: str | Path) -> Self:
        """Load the fit in a file that `save` wrote into this estimator.

        Args:
            path: the file.

        Returns:
            This estimator, fitted.

        Raises:
            StateError: for a fit of another estimator or other options.
            ModelChangedError: for a fit of another model.
            FileNotFoundError: if there is no such file.
        """
        return self.load_state_dict(read_file(path))

    @exclusively
    def attach_data(self, train_loader: Iterable[Any]) -> Self:
        """Attach the training data to a loaded fit, for methods that need them at a query or for the likelihood.

        Args:
            train_loader: a loader of the training rows of the fit, in any order and batch size.

        Returns:
            This estimator.

        Raises:
            StateError: if the rows are not those of the fit.
            DataError, NonDeterministicError: for unusable data, as `fit`.
        """
        self._check_fitted()
        with preserved_random_state():
            batches = TrainingData.checked(train_loader, self.network_, self.likelihood)
        fitted = self.objective_.batches
        assert fitted.checksum is not None
        assert batches.checksum is not None
        if batches.n_data != fitted.n_data or not batches.checksum.agrees(fitted.checksum):
            raise StateError(
                f"the {fitted.n_data} training rows of the fit",
                received=f"{batches.n_data} rows with other inputs or targets",
                remedy="call attach_data with the loader of the fit, in any order and batch size, or fit again.",
            )
        self.objective_ = replace(self.objective_, batches=batches)
        self._on_data_attached(self.objective_)
        return self

    def _get_fit_state(self) -> Learned:
        """Return the tensors and JSON values that `_fit` computed."""
        raise self._unsaved()

    def _set_fit_state(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:  # noqa: ARG002
        """Set what `_fit` computes, from the result of `_get_fit_state`; `objective` has no data."""
        raise self._unsaved()

    def _unsaved(self) -> UnsupportedError:
        return UnsupportedError(
            "an estimator whose fit can be saved",
            received=type(self).__name__,
            remedy="implement _get_fit_state and _set_fit_state, or fit again.",
        )

    def _on_data_attached(self, objective: Objective) -> None:  # noqa: B027
        """Use the training data that were attached to a loaded fit."""

    @property
    def prior_precision_(self) -> PriorOption:
        """The prior precision of the fit: the one that validation rows chose, or `prior_precision`, in 1/weight²."""
        calibration = self.calibration_
        chosen: PriorOption = (
            self.prior_precision if calibration is None or calibration.option.name is None else calibration.value
        )
        return chosen

    def _about(self, objective: Objective, learned: dict[str, Any]) -> About:
        batches, names = objective.batches, list(objective.network.subset.shapes)
        assert batches.checksum is not None
        kind, options, model = type(self).__name__, self._described_options(), model_digest(self.model)
        derivatives, shared = asdict(objective.network.check.report), sorted(batches.layout.shared)
        return About(kind, options, names, model, batches.n_data, batches.checksum, learned, derivatives, shared)

    def _described_options(self) -> dict[str, Any]:
        """Return every compared option by value, in JSON types."""
        return {name: described(stored_option(self, name)) for name in self._option_names()}

    @classmethod
    def _option_names(cls) -> list[str]:
        """Return the names of the options that must agree when a fit is loaded."""
        return [name for name in constructor_options(cls) if name != "model" and name not in cls.not_compared]

    @property
    def network_(self) -> Network:
        """The fitted network as a function of the chosen parameters θ."""
        self._check_fitted()
        return self.objective_.network

    @property
    def theta_(self) -> Tensor:
        """The chosen parameters θ̂ (P,), a copy made by `fit`."""
        return self.network_.theta

    @property
    def n_data_(self) -> int:
        """The number N of training rows, counted while reading the loader."""
        self._check_fitted()
        return self.objective_.batches.n_data

    @abstractmethod
    def _make_objective(self, network: Network, batches: TrainingData) -> Objective:
        """Return the objective L of these options over batches."""

    @abstractmethod
    def _prior(self, network: Network, precision: PriorOption) -> Prior:
        """Return the prior of these options with another precision."""

    def _check_fitted(self) -> None:
        if not hasattr(self, "objective_"):
            raise NotFittedError(
                f"a fitted {type(self).__name__}",
                received="one that is not fitted",
                remedy="call fit(train_loader) first.",
            )


def _check_untuned(state: Mapping[str, Tensor | str]) -> None:
    if TUNING in state:
        raise StateError(
            "the state of a fit without tuning",
            received="a tuned one, whose calibration this estimator would lose",
            remedy="Tuned.load(path, estimator) from estimators.tuning; its predict applies the calibration.",
        )
