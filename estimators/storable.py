"""A fit that can be written to a file and taken over from one, the data apart."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from estimators.batches import AbsentBatches, Batches
from estimators.errors import NotFittedError, StateError, UnsupportedError
from estimators.fingerprint import Fingerprint, fingerprint, refuse_if_changed
from estimators.fit_report import FitReport
from estimators.likelihoods import Likelihood
from estimators.model_checks import check_model
from estimators.models.exclusive import exclusively
from estimators.network import Network
from estimators.objective import Objective
from estimators.pytrees import RowLayout
from estimators.rng import preserved_random_state
from estimators.state import ABOUT, About, FittedState, Learned, digest, read_file, write_file

__all__ = ["Storable"]


class Storable(ABC):
    """What was fitted, an objective over a model, with the tensors and values that a method learned from it."""

    model: nn.Module
    likelihood: Likelihood
    objective_: Objective
    fingerprint_: Fingerprint
    fit_report_: FitReport

    @exclusively
    def state_dict(self) -> FittedState:
        """The fit as a flat dict of tensors, and a JSON text under "about"; the model is not in it, only its digest."""
        self._check_fitted()
        refuse_if_changed(self.model, self.fingerprint_, self.network_.pieces)
        tensors, learned = self._learned()
        return {**tensors, ABOUT: self._about(self.objective_, learned).to_json()}

    @exclusively
    def load_state_dict(self, state: Mapping[str, Tensor | str]) -> Self:
        """Take over a fit from `state_dict()`: same options, same model, any device; the data are not needed.

        Errors: StateError (another estimator, other options), ModelChangedError.
        """
        check_model(self.model)
        about = About.of(state)
        network = Network(self.model, about.parameters)
        layout = RowLayout(frozenset(about.shared_inputs))
        objective = self._over(network, AbsentBatches((), about.n_data, sums=about.sums, layout=layout))
        about.check(self._about(objective, {}))
        self._take_over(state, objective)
        self.objective_ = objective
        self.fingerprint_ = fingerprint(self.model, network.pieces)
        self._report_derivatives(objective)
        return self

    def _report_derivatives(self, objective: Objective) -> None:
        """`fit_report_` with what was compared with plain autograd."""
        report = objective.network.check.report
        fitted = getattr(self, "fit_report_", None)
        self.fit_report_ = FitReport(report) if fitted is None else replace(fitted, derivatives=report)

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
            batches = Batches.checked(train_loader, self.network_, self.likelihood)
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
        options = {name: repr(getattr(self, name)) for name in self._option_names()}
        batches, names = objective.batches, list(objective.network.subset.shapes)
        assert batches.sums is not None
        shared = sorted(batches.layout.shared)
        model = digest(self.model)
        return About(type(self).__name__, options, names, model, batches.n_data, batches.sums, learned, shared)

    @classmethod
    def _option_names(cls) -> list[str]:
        """The arguments of the constructor, which only stores them."""
        return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "model")]

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
    def _over(self, network: Network, batches: Batches) -> Objective:
        """The objective of these options."""

    def _check_fitted(self) -> None:
        if not hasattr(self, "objective_"):
            raise NotFittedError(
                f"a fitted {type(self).__name__}", received="one without fit", remedy="call fit(train_loader) first."
            )
