"""New fits from a fit: the same weights and training rows with other options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

from estimators.calibration.tuned_option import same_value
from estimators.data.batch import PairLoader
from estimators.errors import OptionError
from estimators.estimator.options import constructor_options, stored_option
from estimators.estimator.saving import SavingMixin
from estimators.models.exclusive import exclusively
from estimators.models.network import Network
from estimators.objective.objective import Objective
from estimators.persistence.weight_checksum import check_unchanged, weight_checksum
from estimators.runtime.pass_counter import PassCounter
from estimators.runtime.rng import preserved_random_state

__all__ = ["CloningMixin", "clone"]

_RESCALING_OPTIONS = frozenset({"prior_precision", "prior_mean", "likelihood"})
"""Options with which the data's curvature stays the same (prior) or is multiplied by a number (likelihood, 1/σ²)."""


class CloningMixin(SavingMixin):
    """`clone_with`: a new fit with other options. Each fit has its own network function and pass counter."""

    retrains: ClassVar[bool] = False
    """Whether a fit trains networks. If not, it is made post hoc at the weights of the given model."""

    @exclusively
    def clone_with(self, **options: Any) -> Self:  # noqa: ANN401
        """Return a new fit with other options, on the same model and training rows. This fit does not change.

        The new fit has the prior precision of this fit, unless `options` names another. If `fit` chose it on validation
        rows, it becomes an option of the new estimator. The calibration of predictions, and a space that
        `RegVar.refine` has extended, are kept if no option changes.

        The data's curvature is reused if the method stores it and the change allows it: for another δ, and for another
        σ of all outputs, with which the curvature scales as 1/σ². Otherwise the new fit computes everything again.

        Args:
            **options: arguments of the constructor. A dotted name changes an option of a part:
                `clone_with(**{"solver.lam": 0.01})`.

        Returns:
            The new, fitted estimator.

        Raises:
            OptionError: for an unknown option, or a likelihood of another kind.
            NotFittedError: if this fit was loaded without its data and needs them.
            ModelChangedError: if the model has changed since the fit.
        """
        self._check_fitted()
        check_unchanged(self.model, self.weight_checksum_, self.network_.params)
        same = not options
        if not same_value(self.prior_precision_, self.prior_precision):
            options = {"prior_precision": self.prior_precision_, **options}
        new: Self = clone(self, options)
        if new.likelihood.kind != self.likelihood.kind:
            raise OptionError(
                f"a likelihood of the kind that was fitted, {self.likelihood.kind!r}",
                received=repr(new.likelihood),
                remedy="construct another estimator, and fit it.",
            )
        changed = frozenset(options)
        with preserved_random_state():
            objective = self._objective_of_clone(new, changed)
            with objective.network.check.on_training_rows():
                new._refit(self, objective, changed)
                new._report_passes(objective)
            objective.network.check.forget_gradients()
        new._set_fitted(objective, self.calibration_ if same else None)
        new.weight_checksum_ = weight_checksum(self.model, objective.network.params)
        new._report_derivatives(objective)
        return new

    def _objective_of_clone(self, new: Self, changed: frozenset[str]) -> Objective:
        """Return the training loss with the new options, over the rows of this fit."""
        batches, names = self.objective_.batches, list(self.network_.subset.shapes)
        if not changed <= _RESCALING_OPTIONS:
            names = new._parameter_names(PairLoader(batches))
        same = set(names) == set(self.network_.subset.shapes)
        network = self.network_.counted_by(PassCounter()) if same else Network(self.model, names)
        network.record_training_rows(batches.n_data)
        return replace(new._make_objective(network, batches), process_group=self.objective_.process_group)

    def _refit(self, fitted: Self, objective: Objective, changed: frozenset[str]) -> None:  # noqa: ARG002
        """Fit as `_fit` does, or reuse parts of `fitted`, from which the options in `changed` differ."""
        self._fit(objective, progress_bar=False)

    def _curvature_ratio(self, new: Self, changed: frozenset[str]) -> float | None:
        """Return the new data curvature in multiples of this one; None if it is not a multiple."""
        return new.likelihood.curvature_ratio(self.likelihood) if changed <= _RESCALING_OPTIONS else None

    @property
    def passes_(self) -> float:
        """Forward and backward passes over the N training rows that this fit has used so far, including queries."""
        return self.network_.pass_counter.cost / self.n_data_

    @abstractmethod
    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        """Compute what `_variance` needs."""

    @abstractmethod
    def _parameter_names(self, train_loader: Iterable[Any]) -> list[str]:
        """Return the names of the chosen parameters."""


def clone(part: Any, options: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return a new object of the same class with other arguments of its constructor, not fitted.

    Dotted names change options of parts. Raises OptionError for an unknown name, and what the constructor raises.
    """
    names = constructor_options(type(part))
    direct = {name: value for name, value in options.items() if "." not in name}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        outer, dot, inner = name.partition(".")
        if dot:
            nested.setdefault(outer, {})[inner] = value
    for name in [*direct, *nested]:
        if name not in names:
            raise OptionError(
                f"an option of {type(part).__name__}, one of {[n for n in names if n != 'model']}",
                received=repr(name),
                remedy="a dotted name for an option of a part, such as solver.lam.",
            )
    arguments = {name: stored_option(part, name) for name in names}
    parts = {name: clone(arguments[name], changes) for name, changes in nested.items()}
    return type(part)(**{**arguments, **direct, **parts})
