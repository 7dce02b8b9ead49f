"""What is tried on stored predictions: scales of the variance, and a temperature or a noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from estimators.errors import OptionError

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
            values = {float(value) for value in getattr(self, name)}
            least = 0.0 if name == "variance_scales" else math.ulp(0.0)
            if not all(math.isfinite(value) and value >= least for value in values):
                raise OptionError(
                    f"finite {name}, {'>= 0' if least == 0 else '> 0'}",
                    received=repr(getattr(self, name)),
                    remedy="for instance 10 ** (k / 2) for k in range(-4, 5).",
                )
            object.__setattr__(self, name, tuple(sorted(values | {1.0})))

    def others(self, kind: str) -> tuple[float, ...]:
        """The second axis: temperatures, or for regression factors of σ."""
        return self.noise_factors if kind == "regression" else self.softmax_temperatures


DEFAULT_GRID = CalibrationGrid()
IDENTITY = CalibrationGrid((), (), ())
