"""From one fit another: the same weights and rows, with other options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from estimators.data.training_data import TrainingData
from estimators.errors import OptionError, UnsupportedError
from estimators.estimator.options import constructor_options, stored_option
from estimators.estimator.saving import Storable
from estimators.likelihoods import Gaussian
from estimators.models.exclusive import exclusively
from estimators.models.network import Network
from estimators.objective.objective import Objective
from estimators.persistence.weight_checksum import check_unchanged, weight_checksum
from estimators.runtime.rng import preserved_random_state

__all__ = ["Refittable", "rebuilt"]

_SCALES = frozenset({"prior_precision", "prior_mean", "likelihood"})
"""What leaves the data's curvature as it is, or multiplies it by a number."""


class Refittable(Storable):
    """A fit from which new ones are made. Each has a network function, and so a ledger of passes, of its own."""

    retrains: ClassVar[bool] = False
    """Whether a fit trains networks; else another fit is made post hoc, at the weights of the model that was passed."""

    counts_passes: ClassVar[bool] = True
    """Whether `passes_` is all that a fit sends through a network; False where another package does it."""

    def at_prior_precision(self, prior_precision: float | Mapping[str, float]) -> Self:
        """A new fit with another δ; this one stays as it is. See `with_options`."""
        return self.with_options(prior_precision=prior_precision)

    def at_sigma_noise(self, sigma_noise: float | Tensor) -> Self:
        """A new fit with another σ of the Gaussian noise. See `with_options`.

        Errors: UnsupportedError for another likelihood.
        """
        if not isinstance(self.likelihood, Gaussian):
            raise UnsupportedError(
                "a Gaussian likelihood, which has a sigma_noise", received=repr(self.likelihood), remedy="leave it out."
            )
        return self.with_options(likelihood=Gaussian(sigma_noise))

    @exclusively
    def with_options(self, **options: Any) -> Self:  # noqa: ANN401
        """A new fit with other arguments of the constructor, on the same model and the rows that were read.

        A dotted name reaches into a part: `with_options(**{"solver.lam": 0.01})`. The curvature of the data is taken
        over where the method keeps it and the change allows it (another δ; another σ for all outputs, with which it
        scales as 1/σ²). Everything else is fitted again, and pays for its passes.

        Errors: OptionError for a name that is none, and for another kind of likelihood; NotFittedError for a fit that
        was loaded without its data and needs them; those of `fit`.
        """
        self._check_fitted()
        check_unchanged(self.model, self.weight_checksum_, self.network_.params)
        new: Self = rebuilt(self, options)
        if new.likelihood.kind != self.likelihood.kind:
            raise OptionError(
                f"a likelihood of the kind that was fitted, {self.likelihood.kind!r}",
                received=repr(new.likelihood),
                remedy="construct another estimator, and fit it.",
            )
        with preserved_random_state():
            objective = self._objective_for(new, frozenset(options))
            with objective.network.check.on_training_rows():
                new._refit(self, objective, frozenset(options))
            objective.network.check.forget_gradients()
        new.objective_, new.weight_checksum_ = objective, weight_checksum(self.model, objective.network.params)
        new._report_derivatives(objective)
        return new

    def _objective_for(self, new: Self, changed: frozenset[str]) -> Objective:
        """L of the new options, over the rows that were read."""
        batches = self.objective_.batches
        names = list(self.network_.subset.shapes) if changed <= _SCALES else new._names(_Pairs(batches))
        same = set(names) == set(self.network_.subset.shapes)
        network = self.network_.counted_anew() if same else Network(self.model, names)
        network.data_seen(batches.n_data)
        return replace(new._over(network, batches), process_group=self.objective_.process_group)

    def _refit(self, fitted: Self, objective: Objective, changed: frozenset[str]) -> None:  # noqa: ARG002
        """`_fit`, or less where `fitted`, with these options changed, has a part of it already."""
        self._fit(objective, progress_bar=False)

    def _ratio_to(self, new: Self, changed: frozenset[str]) -> float | None:
        """What the data's curvature of the new options is in multiples of this one; None where it is not that."""
        return new.likelihood.curvature_ratio(self.likelihood) if changed <= _SCALES else None

    @property
    def passes_(self) -> float:
        """What this fit has spent, queries included, in passes of forward and backward over N rows."""
        return self.network_.pass_counter.cost / self.n_data_

    @abstractmethod
    def _fit(self, objective: Objective, *, progress_bar: bool) -> None:
        """The method's own part of `fit`."""

    @abstractmethod
    def _names(self, train_loader: Iterable[Any]) -> list[str]:
        """The chosen parameters."""


@dataclass(frozen=True)
class _Pairs:
    """Batches as a loader of pairs."""

    batches: TrainingData

    def __iter__(self) -> Iterator[Any]:
        return ((batch.x, batch.y) for batch in self.batches)


def rebuilt(part: Any, options: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """The same object with other arguments of its constructor, which only stores them; dotted names reach into parts.

    Errors: OptionError for a name that is none of them; those of the constructor.
    """
    names = constructor_options(type(part))
    direct = {name: value for name, value in options.items() if "." not in name}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        head, dot, rest = name.partition(".")
        if dot:
            nested.setdefault(head, {})[rest] = value
    for name in [*direct, *nested]:
        if name not in names:
            raise OptionError(
                f"an option of {type(part).__name__}, one of {[n for n in names if n != 'model']}",
                received=repr(name),
                remedy="a dotted name for that of a part, such as solver.lam.",
            )
    arguments = {name: stored_option(part, name) for name in names}
    inner = {name: rebuilt(arguments[name], changes) for name, changes in nested.items()}
    return type(part)(**{**arguments, **direct, **inner})
