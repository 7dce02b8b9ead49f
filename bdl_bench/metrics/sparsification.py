"""Sparsification: the error of the rows that remain if the most uncertain ones are removed (Ilg et al. 2018).

With rows in increasing order of uncertainty and squared errors e₁, e₂, ..., the error of the first k rows is

    s(k) = √((e₁ + ... + e_k)/k) / √((e₁ + ... + e_M)/M)

The oracle o(k) orders rows by their squared errors. AUSE is the mean of s(k) − o(k) over k = 1, ..., M, which is 0 for
an uncertainty that orders rows as their errors do. Rows of equal uncertainty, up to round-off, count with the mean
error of their group.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics.selective import risk_coverage

__all__ = ["ause", "sparsification_curve"]

Floats = NDArray[np.float64]
_ROUND_OFF = 1e-9
"""Differences of uncertainties below this fraction of the largest one are round-off."""


def sparsification_curve(uncertainty: Floats, squared_error: Floats) -> Floats:
    """Return s(1), ..., s(M): the root mean squared error of the k most certain rows, relative to that of all rows.

    Args:
        uncertainty: score of each row, (M,); the largest is removed first.
        squared_error: of each row, (M,).

    Returns:
        The curve, (M,); zeros if every error is 0.
    """
    unit = _ROUND_OFF * np.abs(uncertainty).max(initial=0.0)
    in_units = np.round(uncertainty / unit) if np.isfinite(unit) and unit > 0 else uncertainty
    remaining = np.sqrt(risk_coverage(-in_units, squared_error).selective_risk)
    curve: Floats = remaining / remaining[-1] if remaining[-1] > 0 else np.zeros_like(remaining)
    return curve


def ause(uncertainty: Floats, squared_error: Floats) -> float:
    """Return the area under the sparsification error; lower is better, 0 at best.

    Args:
        uncertainty: score of each row, (M,).
        squared_error: of each row, (M,).

    Returns:
        The mean difference between both curves, without a unit.
    """
    oracle = sparsification_curve(squared_error, squared_error)
    return float((sparsification_curve(uncertainty, squared_error) - oracle).mean())
