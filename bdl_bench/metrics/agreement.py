"""How well a variance agrees with the exact one, over the same outputs: rank, level and pointwise error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

__all__ = ["Agreement", "agreement"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Rank, level and pointwise error.

    `spearman`: rank correlation, None for a constant variance. With q = variance / exact at each output, `mean_ratio`
    is the mean of q and `relative_rmse` is √mean (q − 1)².
    """

    spearman: float | None
    mean_ratio: float
    relative_rmse: float


def agreement(variance: Floats, exact: Floats) -> Agreement:
    """Agreement of two variances of one shape; the exact one is positive everywhere."""
    v, e = variance.reshape(-1), exact.reshape(-1)
    quotient = v / e
    varied = np.ptp(v) > 0 and np.ptp(e) > 0
    return Agreement(
        spearman=float(spearmanr(v, e).statistic) if varied else None,
        mean_ratio=float(quotient.mean()),
        relative_rmse=float(np.sqrt(np.square(quotient - 1).mean())),
    )
