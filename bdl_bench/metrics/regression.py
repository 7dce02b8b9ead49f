"""Scores of Gaussian predictions N(mean, variance), variance = epistemic + noise; mean, variance, targets (M, C).

Each returns one number an example, (M,): sums over outputs for the log-likelihood, means over outputs otherwise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

__all__ = ["coverage", "crps", "nll", "squared_error", "width"]

Floats = NDArray[np.float64]


def nll(mean: Floats, variance: Floats, targets: Floats) -> Floats:
    """−log N(y | mean, variance) summed over outputs, nats."""
    scores: Floats = 0.5 * (np.square(targets - mean) / variance + np.log(2 * np.pi * variance)).sum(-1)
    return scores


def squared_error(mean: Floats, targets: Floats) -> Floats:
    """(y − mean)², mean over outputs."""
    scores: Floats = np.square(targets - mean).mean(-1)
    return scores


def crps(mean: Floats, variance: Floats, targets: Floats) -> Floats:
    """Continuous ranked probability score (Gneiting and Raftery 2007).

    s (z (2Φ(z) − 1) + 2φ(z) − 1/√π),  z = (y − mean)/s
    """
    s = np.sqrt(variance)
    z = (targets - mean) / s
    scores: Floats = (s * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))).mean(-1)
    return scores


def coverage(mean: Floats, variance: Floats, targets: Floats, *, level: float) -> Floats:
    """The share of outputs inside their central interval of `level`."""
    inside: Floats = (np.abs(targets - mean) <= _quantile(level) * np.sqrt(variance)).mean(-1)
    return inside


def width(variance: Floats, *, level: float) -> Floats:
    """The full width of the central interval of `level`, in the unit of the target."""
    widths: Floats = (2 * _quantile(level) * np.sqrt(variance)).mean(-1)
    return widths


def _quantile(level: float) -> float:
    return float(norm.ppf(0.5 + level / 2))
