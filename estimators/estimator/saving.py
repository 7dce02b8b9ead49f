"""A fit that can be written to a file and taken over from one, the data apart."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

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
from estimators.objective.objective import Objective
from estimators.persistence.option_values import described
from estimators.persistence.state import ABOUT, TUNING, About, FittedState, Learned, model_digest, read_file, write_file
from estimators.persistence.weight_checksum import WeightChecksum, check_unchanged, weight_checksum
from estimators.runtime.rng import preserved_random_state

__all__ = ["Storable"]


class Storable(ABC):
    """What was fitted, an objective over a model, with the tensors and values that a method learned from it."""

    not_compared: ClassVar[frozenset[str]] = frozenset()
    """Options that do not affect the fit, or that cannot be compared: a saved fit may be read with others."""

    model: nn.Module
    likelihood: Likelihood
    objective_: Objective
    weight_checksum_: WeightChecksum
    fit_report_: FitReport
    _calibrated_by: str | None = None
    """What tuning found to change its predictions by, which is not a part of the fit."""

    @exclusively
    def state_dict(self) -> FittedState:
        """The fit as a flat dict of tensors, and a JSON text under "about"; the model is not in it, only its digest.

        Warns: CalibrationNotSavedWarning where the fit was tuned, and predictions are to be calibrated.
        """
        if self._calibrated_by is not None:
            warnings.warn(
                f"a fit that was tuned is saved without its calibration, {self._calibrated_by}: save what tune "
                "returned, tuned.save(path), and read it by Tuned.load(path, estimator)",
                CalibrationNotSavedWarning,
                stacklevel=2,
            )
        return self._fitted_state()

    def _fitted_state(self) -> FittedState:
        """`state_dict`, without the warning."""
        self._check_fitted()
        check_unchanged(self.model, self.weight_checksum_, self.network_.params)
        tensors, learned = self._learned()
        return {**tensors, ABOUT: self._about(self.objective_, learned).to_json()}

    @exclusively
    def load_state_dict(self, state: Mapping[str, Tensor | str]) -> Self:
        """Take over a fit from `state_dict()`: same options, same model, any device; the data are not needed.

        Errors: StateError (another estimator, other options), ModelChangedError.
        """
        check_model(self.model)
        about = About.of(state)
        _check_untuned(state)
        about.check(type(self).__name__, self._described_options(), model_digest(self.model))
        network = Network(self.model, about.parameters)
        network.check.report = DerivativeReport(**about.derivatives)
        layout = RowLayout(frozenset(about.shared_inputs))
        objective = self._over(network, AbsentTrainingData((), about.n_data, sums=about.sums, layout=layout))
        self._take_over(state, objective)
        self.objective_, self._calibrated_by = objective, None
        self.weight_checksum_ = weight_checksum(self.model, network.params)
        self._report_derivatives(objective)
        return self

    def _report_derivatives(self, objective: Objective) -> None:
        """`fit_report_` with what was compared with plain autograd."""
        report = objective.network.check.report
        fitted = getattr(self, "fit_report_", None)
        if fitted is None:
            self.fit_report_ = FitReport(report)
        elif isinstance(fitted, FitReport):  # an estimator of others may have a report of its own
            self.fit_report_ = replace(fitted, derivatives=report)

    def _take_over(self, state: Mapping[str, Tensor | str], objective: Objective) -> None:
        """The learned part of a state that has been checked."""
        tensors = {name: t.to(objective.theta.device) for name, t in state.items() if isinstance(t, Tensor)}
        self._restore(objective, tensors, About.of(state).finished())

    def save(self, path: str | Path) -> None:
        """Write the fit to one safetensors file, whole or not at all."""
        write_file(self.state_dict(), path)

    def load(self, path: str | Path) -> Self:
        """Take over the fit in a file that `save` wrote. Errors: StateError, ModelChangedError, FileNotFoundError."""
        return self.load_state_dict(read_file(path))

    @exclusively
    def attach(self, train_loader: Iterable[Any]) -> Self:
        """Give a loaded fit its training data again: for what solves at query time, or needs the likelihood's value.

        Errors: StateError where they are not the rows of the fit; those of `fit`.
        """
        self._check_fitted()
        with preserved_random_state():
            batches = TrainingData.checked(train_loader, self.network_, self.likelihood)
        fitted = self.objective_.batches
        assert fitted.sums is not None
        assert batches.sums is not None
        if batches.n_data != fitted.n_data or not batches.sums.agrees(fitted.sums):
            raise StateError(
                f"the {fitted.n_data} training rows of the fit",
                received=f"{batches.n_data} rows with other inputs or targets",
                remedy="attach the loader that was fitted, in any order and batch size, or fit again.",
            )
        self.objective_ = replace(self.objective_, batches=batches)
        self._attached(self.objective_)
        return self

    def _learned(self) -> Learned:
        """Tensors and JSON values that `_fit` computed."""
        raise self._unsaved()

    def _restore(self, objective: Objective, tensors: dict[str, Tensor], learned: dict[str, Any]) -> None:  # noqa: ARG002
        """What `_fit` would have left, from what `_learned` gave; `objective` has no data."""
        raise self._unsaved()

    def _unsaved(self) -> UnsupportedError:
        return UnsupportedError(
            "an estimator whose fit can be saved",
            received=type(self).__name__,
            remedy="write its _learned and _restore, or fit again.",
        )

    def _attached(self, objective: Objective) -> None:  # noqa: B027
        """The data have come back."""

    def _about(self, objective: Objective, learned: dict[str, Any]) -> About:
        batches, names = objective.batches, list(objective.network.subset.shapes)
        assert batches.sums is not None
        kind, options, model = type(self).__name__, self._described_options(), model_digest(self.model)
        derivatives, shared = asdict(objective.network.check.report), sorted(batches.layout.shared)
        return About(kind, options, names, model, batches.n_data, batches.sums, learned, derivatives, shared)

    def _described_options(self) -> dict[str, Any]:
        """Every option by value, in JSON types."""
        return {name: described(stored_option(self, name)) for name in self._option_names()}

    @classmethod
    def _option_names(cls) -> list[str]:
        """The options that tell a fit from another: those of the constructor, which only stores them."""
        return [name for name in constructor_options(cls) if name != "model" and name not in cls.not_compared]

    @property
    def network_(self) -> Network:
        """The fitted network as a function of θ."""
        self._check_fitted()
        return self.objective_.network

    @property
    def theta_(self) -> Tensor:
        """θ̂ (P,), a copy made by `fit`."""
        return self.network_.theta

    @property
    def n_data_(self) -> int:
        """N, counted from what the loader yielded."""
        self._check_fitted()
        return self.objective_.batches.n_data

    @abstractmethod
    def _over(self, network: Network, batches: TrainingData) -> Objective:
        """The objective of these options."""

    def _check_fitted(self) -> None:
        if not hasattr(self, "objective_"):
            raise NotFittedError(
                f"a fitted {type(self).__name__}", received="one without fit", remedy="call fit(train_loader) first."
            )


def _check_untuned(state: Mapping[str, Tensor | str]) -> None:
    if TUNING in state:
        raise StateError(
            "the state of a fit alone",
            received="a tuned one, whose calibration this estimator would lose",
            remedy="Tuned.load(path, estimator), from estimators.tuning, whose predict applies it.",
        )
