"""What is tried on stored predictions: scales of the variance, and a temperature or a noise."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from estimators.errors import OptionError
from estimators.option_checks import as_number, shown

__all__ = ["DEFAULT_GRID", "IDENTITY", "CalibrationGrid"]

_SCALES = (0.0, *(10 ** (k / 2) for k in range(-8, 9)))
_FACTORS = tuple(10 ** (k / 6) for k in range(-6, 7))


@dataclass(frozen=True)
class CalibrationGrid:
    """Values of what can be changed after a prediction was made, each sorted, with 1, no change, always among them.

    Args:
        variance_scales: factors of the epistemic variance, >= 0; 0 is the plain network. 1e-4 to 1e4, two a decade,
            and 0.
        softmax_temperatures: of classification and binary, > 0. 0.1 to 10, six a decade.
        noise_factors: of regression, factors of σ, > 0. Likewise.
    """

    variance_scales: tuple[float, ...] = _SCALES
    softmax_temperatures: tuple[float, ...] = _FACTORS
    noise_factors: tuple[float, ...] = _FACTORS

    def __post_init__(self) -> None:
        for name in ("variance_scales", "softmax_temperatures", "noise_factors"):
            given = getattr(self, name)
            numbers = [as_number(value) for value in given] if isinstance(given, Iterable) else [None]
            least = 0.0 if name == "variance_scales" else math.ulp(0.0)
            values = {float(n) for n in numbers if n is not None and math.isfinite(n) and n >= least}
            if not all(number in values for number in numbers):
                raise OptionError(
                    f"finite {name}, {'>= 0' if least == 0 else '> 0'}",
                    received=shown(given),
                    remedy="for instance 10 ** (k / 2) for k in range(-4, 5).",
                )
            object.__setattr__(self, name, tuple(sorted(values | {1.0})))

    def others(self, kind: str) -> tuple[float, ...]:
        """The second axis: temperatures, or for regression factors of σ."""
        return self.noise_factors if kind == "regression" else self.softmax_temperatures


DEFAULT_GRID = CalibrationGrid()
IDENTITY = CalibrationGrid((), (), ())
