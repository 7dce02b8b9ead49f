"""The values that calibration tries: scales of the variance, and a temperature or a noise factor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from estimators.errors import OptionError
from estimators.option_checks import as_number, shown

__all__ = ["COARSE_GRID", "DEFAULT_GRID", "IDENTITY", "CalibrationGrid"]

_SCALES = (0.0, *(10 ** (k / 2) for k in range(-8, 9)))
_FACTORS = tuple(10 ** (k / 6) for k in range(-6, 7))


@dataclass(frozen=True)
class CalibrationGrid:
    """The values that `calibrate` tries on stored predictions. Each tuple is sorted, and 1 (no change) is added to it.

    Args:
        variance_scales: factors of the epistemic variance, >= 0; 0 is the plain network. Default: 0, and 1e-4 to 1e4
            with two values per decade.
        softmax_temperatures: temperatures of classification and binary predictions, > 0. Default: 0.1 to 10 with six
            values per decade.
        noise_factors: factors of σ in regression, > 0. Default: 0.1 to 10 with six values per decade.

    Raises:
        OptionError: for a value that is not finite or too small.

    Example:
        >>> CalibrationGrid(variance_scales=(0.1, 10.0)).variance_scales
        (0.1, 1.0, 10.0)
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

    def noise_or_temperature(self, kind: str) -> tuple[float, ...]:
        """Return the values that are tried beside the variance scale.

        Args:
            kind: the kind of the likelihood, such as "regression".

        Returns:
            The noise factors for regression, else the softmax temperatures.
        """
        return self.noise_factors if kind == "regression" else self.softmax_temperatures


DEFAULT_GRID = CalibrationGrid()
COARSE_GRID = CalibrationGrid(
    variance_scales=(0.0, *(10.0**k for k in range(-4, 7))),
    softmax_temperatures=tuple(10 ** (k / 3) for k in range(-3, 4)),
    noise_factors=tuple(10 ** (k / 3) for k in range(-3, 4)),
)
"""A third of the points of `DEFAULT_GRID`, for a search that refines around the best point. Scales reach 10⁶ for
methods whose variance has an arbitrary scale, such as SWAG."""
IDENTITY = CalibrationGrid((), (), ())
