"""Scores of Gaussian predictions N(mean, variance), variance = epistemic + noise; mean, variance, targets (M, C).

Unless a docstring says otherwise, scores are one number per example, (M,): sums over outputs for log-likelihood and
entropy, means over outputs otherwise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scoringrules import crps_normal, es_ensemble
from scoringrules import interval_score as winkler_score

__all__ = [
    "CURVE_LEVELS",
    "central_level",
    "coverage",
    "coverage_curve",
    "coverage_error",
    "crps",
    "energy_score",
    "entropy",
    "interval_score",
    "nll",
    "pit",
    "squared_error",
    "width",
]

Floats = NDArray[np.float64]

CURVE_LEVELS: Floats = np.arange(1, 20) / 20
"""Nominal coverages 5 %, 10 %, ..., 95 %."""


def nll(mean: Floats, variance: Floats, targets: Floats) -> Floats:
    """Return −log N(y | mean, variance) summed over outputs, in nats."""
    scores: Floats = 0.5 * (np.square(targets - mean) / variance + np.log(2 * np.pi * variance)).sum(-1)
    return scores


def squared_error(mean: Floats, targets: Floats) -> Floats:
    """Return (y − mean)², averaged over outputs."""
    scores: Floats = np.square(targets - mean).mean(-1)
    return scores


def entropy(variance: Floats) -> Floats:
    """Return the entropy of the prediction, ½ log(2πe · variance) summed over outputs, in nats."""
    nats: Floats = 0.5 * np.log(2 * np.pi * np.e * variance).sum(-1)
    return nats


def crps(mean: Floats, variance: Floats, targets: Floats) -> Floats:
    """Return the continuous ranked probability score of a Gaussian (Gneiting and Raftery 2007), by scoringrules.

    s (z (2Φ(z) − 1) + 2φ(z) − 1/√π),  z = (y − mean)/s
    """
    # Without a named backend, scoringrules uses numba if that is installed.
    scores: Floats = crps_normal(targets, mean, np.sqrt(variance), backend="numpy").mean(-1)
    return scores


def energy_score(samples: Floats, targets: Floats) -> Floats:
    """Return the energy score of all outputs of a row together, by scoringrules; for one output it estimates the CRPS.

    E ‖y′ − y‖ − ½ E ‖y′ − y″‖ for independent y′, y″ of the prediction (Gneiting and Raftery 2007), unbiased.

    Args:
        samples: S >= 2 samples of the target, noise included, (S, M, C).
        targets: (M, C).

    Returns:
        Scores in the unit of the target, (M,).
    """
    # One row at a time: all S² differences of its samples are formed for each output.
    rows = [
        es_ensemble(targets[row], samples[:, row], m_axis=0, estimator="fair", backend="numpy")
        for row in range(len(targets))
    ]
    return np.array(rows, dtype=np.float64)


def interval_score(mean: Floats, variance: Floats, targets: Floats, *, level: float) -> Floats:
    """Return the interval (Winkler) score of the central interval of `level`, averaged over outputs, by scoringrules.

    Width + (2/α) · distance of the target from the interval, α = 1 − level; lower is better, in the unit of the target.
    """
    half = _quantile(level) * np.sqrt(variance)
    # scoringrules drops axes of length 1.
    scores = winkler_score(targets, mean - half, mean + half, 1 - level, backend="numpy").reshape(targets.shape)
    means: Floats = scores.mean(-1)
    return means


def coverage(mean: Floats, variance: Floats, targets: Floats, *, level: float) -> Floats:
    """Return the share of outputs inside their central interval of `level`."""
    inside: Floats = (np.abs(targets - mean) <= _quantile(level) * np.sqrt(variance)).mean(-1)
    return inside


def width(variance: Floats, *, level: float) -> Floats:
    """Return the full width of the central interval of `level`, in the unit of the target."""
    widths: Floats = (2 * _quantile(level) * np.sqrt(variance)).mean(-1)
    return widths


def pit(mean: Floats, variance: Floats, targets: Floats) -> Floats:
    """Return the probability integral transform Φ((y − mean)/s), (M, C): uniform on [0, 1] if calibrated."""
    values: Floats = norm.cdf((targets - mean) / np.sqrt(variance))
    return values


def central_level(mean: Floats, variance: Floats, targets: Floats) -> Floats:
    """Return the level of the smallest central interval that contains the target, |2 PIT − 1|, (M, C)."""
    levels: Floats = np.abs(2 * pit(mean, variance, targets) - 1)
    return levels


def coverage_curve(central_levels: Floats, *, levels: Floats = CURVE_LEVELS) -> Floats:
    """Return the share of targets inside their central interval at each of L nominal levels, (L,).

    `central_levels` are those of all targets, in any shape. A calibrated prediction has the levels themselves
    (Kuleshov et al. 2018).
    """
    return np.array([(central_levels <= level).mean() for level in levels])


def coverage_error(central_levels: Floats, *, levels: Floats = CURVE_LEVELS) -> float:
    """Return the mean over the levels of |observed − nominal coverage|."""
    return float(np.abs(coverage_curve(central_levels, levels=levels) - levels).mean())


def _quantile(level: float) -> float:
    return float(norm.ppf(0.5 + level / 2))
