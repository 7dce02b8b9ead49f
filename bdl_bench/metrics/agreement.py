"""Agreement of a variance with the exact one: of the order of the outputs, of their mean level, and pointwise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

__all__ = ["Agreement", "WorstPoints", "agreement", "worst_points"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Agreement:
    """Agreement of a variance v with the exact variance e; q = v/e at each output.

    Args:
        spearman: rank correlation of v and e over the outputs; None for a constant variance.
        mean_ratio: the level, mean q.
        relative_rmse: √mean (q − 1)².
        geometric_level: the level by the geometric mean, exp(mean log q); None if some v is not positive.
        slope: of the least-squares line of v on e with an intercept, cov(v, e)/var(e). It is 1 if differences agree and
            0 if v is constant; None for a constant e.
        error_95: 95th percentile of |q − 1|.
    """

    spearman: float | None
    mean_ratio: float
    relative_rmse: float
    geometric_level: float | None
    slope: float | None
    error_95: float


@dataclass(frozen=True)
class WorstPoints:
    """The outputs of largest |q − 1|, worst first.

    Args:
        indices: of the outputs in the variance, (k, number of axes).
        ratios: q of the outputs, (k,).
    """

    indices: Integers
    ratios: Floats


def agreement(variance: Floats, exact: Floats) -> Agreement:
    """Return the agreement of a variance with the exact one.

    Args:
        variance: of any shape, such as (M, C).
        exact: of the same shape, positive.

    Returns:
        The agreement over all outputs.
    """
    v, e = variance.reshape(-1), exact.reshape(-1)
    quotient = v / e
    return Agreement(
        spearman=float(spearmanr(v, e).statistic) if np.ptp(v) > 0 and np.ptp(e) > 0 else None,
        mean_ratio=float(quotient.mean()),
        relative_rmse=float(np.sqrt(np.square(quotient - 1).mean())),
        geometric_level=float(np.exp(np.log(quotient).mean())) if quotient.min() > 0 else None,
        slope=_slope(v, e) if np.ptp(e) > 0 else None,
        error_95=float(np.quantile(np.abs(quotient - 1), 0.95)),
    )


def worst_points(variance: Floats, exact: Floats, *, k: int = 10) -> WorstPoints:
    """Return the outputs at which variance/exact is furthest from 1.

    Args:
        variance: of any shape, such as (M, C).
        exact: of the same shape, positive.
        k: number of outputs; all if there are fewer.

    Returns:
        Indices and ratios, worst first.
    """
    quotient = variance / exact
    order = np.argsort(-np.abs(quotient - 1), axis=None, kind="stable")[:k]
    return WorstPoints(np.stack(np.unravel_index(order, variance.shape), axis=-1), quotient.reshape(-1)[order])


def _slope(v: Floats, e: Floats) -> float:
    centred = e - e.mean()
    return float(centred @ (v - v.mean()) / (centred @ centred))
