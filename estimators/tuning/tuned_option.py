"""The one thing of a fit that is tuned with a fit for each value: an option of its constructor, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import torch

from estimators.errors import OptionError, UnsupportedError
from estimators.estimator.base import UncertaintyEstimator
from estimators.likelihoods import Gaussian
from estimators.option_checks import as_number
from estimators.persistence.option_values import described

__all__ = ["TunedOption", "is_number", "log_spaced"]

E = TypeVar("E", bound=UncertaintyEstimator)

_UNITS = {"prior_precision": "1/weight²", "sigma_noise": "target"}


@dataclass(frozen=True)
class TunedOption:
    """`name`: "prior_precision", "sigma_noise", another option such as "rate", or that of a part, such as "solver.lam".

    None: nothing is fitted again.
    """

    name: str | None

    @property
    def unit(self) -> str | None:
        """Of its values."""
        return _UNITS.get(self.name or "")

    def value_of(self, estimator: UncertaintyEstimator) -> Any:  # noqa: ANN401
        """What a fit has. Errors: OptionError for a name that is none; UnsupportedError without a Gaussian noise."""
        if self.name is None:
            return None
        if self.name == "sigma_noise":
            return _sigma_noise(estimator)
        try:
            return reduce(getattr, self.name.split("."), estimator)
        except AttributeError as error:
            raise OptionError(
                f"an option of {type(estimator).__name__}, or None",
                received=repr(self.name),
                remedy="prior_precision, sigma_noise, or a dotted name for that of a part, such as solver.lam.",
            ) from error

    def at(self, estimator: E, value: Any) -> E:  # noqa: ANN401
        """A new fit with that value."""
        assert self.name is not None
        if self.name == "sigma_noise":
            return estimator.at_sigma_noise(value)
        return estimator.with_options(**{self.name: value})

    def candidates(self, estimator: UncertaintyEstimator, values: Sequence[Any] | None, *, decades: float) -> list[Any]:
        """The value of the given fit and those asked for, or four a decade around it, numbers in ascending order.

        Errors: OptionError where they cannot be chosen, and for values without an axis.
        """
        given = self.value_of(estimator)
        if self.name is None and values is not None:
            raise OptionError("no values without an axis", received=repr(values), remedy='axis="prior_precision".')
        if values is None:
            values = [] if self.name is None else self._around(given, decades)
        values = [_plain(value) for value in values]
        others = [value for value in values if not same(value, given)]
        numbers = sorted(value for value in [given, *others] if is_number(value))
        return [value for value in [given, *others] if not is_number(value)] + numbers

    def _around(self, given: Any, decades: float) -> list[float]:  # noqa: ANN401
        if self.name not in _UNITS or not is_number(given):
            raise OptionError(
                f"values of {self.name}, whose range nothing here can know",
                received=f"none, at {given!r}",
                remedy="values=[...].",
            )
        return log_spaced(given, decades=decades)


def log_spaced(centre: float, *, decades: float) -> list[float]:
    """Four a decade, as many below as above, the centre itself among them."""
    half = round(4 * decades)
    return [centre * 10 ** (k / 4) for k in range(-half, half + 1)]


def is_number(value: object) -> bool:
    """Whether it has a place on an axis."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def same(value: object, other: object) -> bool:
    """Whether one fit serves both, for numbers up to round-off."""
    if is_number(value) and is_number(other):
        assert isinstance(value, (int, float))
        assert isinstance(other, (int, float))
        return abs(value - other) <= 1e-12 * abs(value)
    return bool(described(value) == described(other))


def _plain(value: Any) -> Any:  # noqa: ANN401
    """A number of numpy or torch as one of Python, with a place on the axis; anything else as it is."""
    number = as_number(value) if getattr(value, "ndim", 0) == 0 else None
    return value if number is None else number


def _sigma_noise(estimator: UncertaintyEstimator) -> Any:  # noqa: ANN401
    if not isinstance(estimator.likelihood, Gaussian):
        raise UnsupportedError(
            "a Gaussian likelihood, which has a sigma_noise", received=repr(estimator.likelihood), remedy="axis=None."
        )
    sigma = estimator.likelihood.sigma_noise
    return float(sigma) if isinstance(sigma, torch.Tensor) and sigma.ndim == 0 else sigma
