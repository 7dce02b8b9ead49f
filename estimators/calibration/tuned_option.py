"""The option of an estimator's constructor that is tuned, with one fit per value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol, Self, TypeVar

import torch

from estimators.errors import OptionError, UnsupportedError
from estimators.likelihoods import Gaussian, Likelihood
from estimators.option_checks import PriorOption, as_number
from estimators.persistence.option_values import described

__all__ = ["DECADES", "Tunable", "TunedOption", "is_number", "log_spaced", "same_value"]

DECADES = 1.0
"""The default range of an option on either side of the given value: a trained δ or σ has the right magnitude."""


class Tunable(Protocol):
    """What a fitted estimator has for tuning, beside its options."""

    likelihood: Likelihood

    @property
    def prior_precision_(self) -> PriorOption:
        """The prior precision of the fit."""
        ...

    def clone_with(self, **options: Any) -> Self:  # noqa: ANN401
        """Return a new fit with other options."""
        ...


E = TypeVar("E", bound=Tunable)

_UNITS = {"prior_precision": "1/weight²", "sigma_noise": "target"}


@dataclass(frozen=True)
class TunedOption:
    """An option by its name: "prior_precision", "sigma_noise", "rate", or a dotted one such as "solver.lam".

    With the name None, nothing is refitted and only predictions are calibrated.
    """

    name: str | None

    @property
    def unit(self) -> str | None:
        """The unit of the values, None if it is not known."""
        return _UNITS.get(self.name or "")

    def value_of(self, estimator: Tunable) -> Any:  # noqa: ANN401
        """Return the value in an estimator. Raises OptionError for an unknown name, UnsupportedError without σ."""
        if self.name is None:
            return None
        if self.name == "sigma_noise":
            return _sigma_noise(estimator)
        if self.name == "prior_precision":
            return estimator.prior_precision_
        try:
            return reduce(getattr, self.name.split("."), estimator)
        except AttributeError as error:
            raise OptionError(
                f"an option of {type(estimator).__name__}, or None",
                received=repr(self.name),
                remedy="prior_precision, sigma_noise, or a dotted name for an option of a part, such as solver.lam.",
            ) from error

    def refit(self, estimator: E, value: Any) -> E:  # noqa: ANN401
        """Return a new fit with this value."""
        return estimator.clone_with(**self.as_options(estimator, value))

    def as_options(self, estimator: Tunable, value: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return the arguments of `clone_with` for this value."""
        assert self.name is not None
        if self.name != "sigma_noise":
            return {self.name: value}
        likelihood = estimator.likelihood
        return {"likelihood": likelihood.with_sigma(value) if isinstance(likelihood, Gaussian) else Gaussian(value)}

    def candidates(self, estimator: Tunable, values: Sequence[Any] | None, *, decades: float) -> list[Any]:
        """Return the value of the given fit and the requested ones, numbers in ascending order.

        If no values are requested, take four per decade around the given one. Raises OptionError if that is not
        possible, and for values without an option.
        """
        given = self.value_of(estimator)
        if self.name is None and values is not None:
            raise OptionError("no values without an option", received=repr(values), remedy='option="prior_precision".')
        if values is None:
            values = [] if self.name is None else self._around(given, decades)
        values = [_plain(value) for value in values]
        others = [value for value in values if not same_value(value, given)]
        numbers = sorted(value for value in [given, *others] if is_number(value))
        return [value for value in [given, *others] if not is_number(value)] + numbers

    def _around(self, given: Any, decades: float) -> list[float]:  # noqa: ANN401
        if self.name not in _UNITS or not is_number(given):
            raise OptionError(
                f"values to try for {self.name}, which has no default range",
                received=f"none, with {given!r} in the given fit",
                remedy="values=[...].",
            )
        return log_spaced(given, decades=decades)


def log_spaced(centre: float, *, decades: float) -> list[float]:
    """Return four values per decade, symmetric in the logarithm, with the centre among them."""
    half = round(4 * decades)
    return [centre * 10 ** (k / 4) for k in range(-half, half + 1)]


def is_number(value: object) -> bool:
    """Return whether a value is a real number, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def same_value(value: object, other: object) -> bool:
    """Return whether two values mean the same fit; numbers are compared up to round-off."""
    if is_number(value) and is_number(other):
        assert isinstance(value, (int, float))
        assert isinstance(other, (int, float))
        return abs(value - other) <= 1e-12 * abs(value)
    return bool(described(value) == described(other))


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Convert a scalar of numpy or torch to a Python number; return anything else unchanged."""
    number = as_number(value) if getattr(value, "ndim", 0) == 0 else None
    return value if number is None else number


def _sigma_noise(estimator: Tunable) -> Any:  # noqa: ANN401
    if not isinstance(estimator.likelihood, Gaussian):
        raise UnsupportedError(
            "a Gaussian likelihood, which has a sigma_noise", received=repr(estimator.likelihood), remedy="option=None."
        )
    sigma = estimator.likelihood.sigma_noise
    return float(sigma) if isinstance(sigma, torch.Tensor) and sigma.ndim == 0 else sigma
