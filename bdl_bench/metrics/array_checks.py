"""Checks of the arrays that metrics are computed from: no NaN, no variance that is not positive."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from estimators.errors import DataError

__all__ = ["check_arrays"]

_MAY_BE_INFINITE = ("log_probs", "log_odds")  # a class may have probability 0


def check_arrays(arrays: Mapping[str, NDArray[Any]], describe: Callable[[int], str] = "row {}".format) -> None:
    """Raise DataError for NaN, for Inf but in log-probabilities, and for a total variance that is not positive.

    `describe` returns what a message says of the entry with an index.
    """
    for name, array in arrays.items():
        quantity = name.rpartition("/")[2]
        if array.dtype.kind != "f":
            continue
        bad = np.isnan(array) if quantity in _MAY_BE_INFINITE else ~np.isfinite(array)
        if bad.any():
            raise DataError(
                "finite predictions",
                received=f"{int(bad.sum())} NaN or Inf among {array.size} values of {name}, the first in "
                f"{describe(_row(bad))}",
                remedy="look at the variance of the method, at the scale of the data, and at prior_precision.",
            )
        if quantity == "total_variance" and bool((array <= 0).any()):
            raise DataError(
                "a positive total_variance, epistemic plus noise",
                received=f"{array.min():.3g} as the least of {name}, the first that is not positive in "
                f"{describe(_row(array <= 0))}",
                remedy="a method whose variance can be negative needs more draws or probes, or a larger noise.",
            )


def _row(bad: NDArray[np.bool_]) -> int:
    return int(np.argwhere(bad)[0, 0])
