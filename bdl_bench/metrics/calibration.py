"""Calibration of top-label confidence: bins of M rows, and calibration errors over them.

    ECE   = Σ_b (n_b / M) |confidence_b − accuracy_b|
    l2²   = Σ_b (n_b / M) (confidence_b − accuracy_b)²
    MCE   = max over b of |confidence_b − accuracy_b|
    dECE² = Σ_b (n_b / M) [(confidence_b − accuracy_b)² − accuracy_b (1 − accuracy_b) / (n_b − 1)]

confidence_b and accuracy_b are means over the n_b rows of bin b. Equal-width bins (Naeini et al. 2015; Guo et al. 2017)
are [0, 1/B], (1/B, 2/B], ..., (1 − 1/B, 1]: a confidence of exactly 1 is in the last one, which is closed. Equal-mass
bins (Nixon et al. 2019, adaptive) contain equally many rows, but rows of equal confidence are all in the lower bin, so
that no result depends on the order of the rows. `order` is a score that orders rows as the confidence does, without
ties at a confidence of 1 in float64, such as the log-odds; None: the confidence itself.

dECE is the debiased l2 error of Kumar, Liang and Ma (2019, "Verified uncertainty calibration") over equal-mass bins.
The subtracted term is the expected contribution of chance to the squared difference in a bin. As in their code, a bin
of one row counts zero, and a negative sum is an error of 0. All arrays are (M,).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

__all__ = [
    "Bins",
    "adaptive_ece",
    "classwise_ece",
    "debiased_ece",
    "ece",
    "equal_mass_bins",
    "equal_width_bins",
    "l2_ece",
    "mce",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
N_BINS = 15
"""Number of bins, as in Guo et al. (2017)."""


@dataclass(frozen=True)
class Bins:
    """The points of a reliability diagram: mean confidence, accuracy and number of rows of each non-empty bin, (B,)."""

    confidence: Floats
    accuracy: Floats
    count: Floats

    @property
    def error(self) -> float:
        """The mean of |confidence − accuracy| over bins, weighted by their counts."""
        return float(np.average(np.abs(self.confidence - self.accuracy), weights=self.count))

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """Return the lower and upper ends of the Wilson score interval of each accuracy, (B,)."""
        z, p, n = float(norm.ppf(0.5 + level / 2)), self.accuracy, self.count
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        return centre - half, centre + half


def ece(confidence: Floats, correct: Floats, *, n_bins: int = N_BINS) -> float:
    """Return the expected calibration error over equal-width bins."""
    return _absolute_error(confidence - correct, _by_width(confidence, n_bins))


def l2_ece(confidence: Floats, correct: Floats, *, n_bins: int = N_BINS) -> float:
    """Return the root of the mean squared calibration error over equal-width bins, positive by chance alone."""
    bins = equal_width_bins(confidence, correct, n_bins=n_bins)
    return float(np.sqrt(np.average(np.square(bins.confidence - bins.accuracy), weights=bins.count)))


def mce(confidence: Floats, correct: Floats, *, n_bins: int = N_BINS) -> float:
    """Return the largest calibration error of a non-empty equal-width bin, of one row or of many."""
    bins = equal_width_bins(confidence, correct, n_bins=n_bins)
    return float(np.abs(bins.confidence - bins.accuracy).max())


def adaptive_ece(confidence: Floats, correct: Floats, order: Floats | None = None, *, n_bins: int = N_BINS) -> float:
    """Return the expected calibration error over equal-mass bins."""
    return _absolute_error(confidence - correct, _by_mass(confidence if order is None else order, n_bins))


def debiased_ece(confidence: Floats, correct: Floats, order: Floats | None = None, *, n_bins: int = N_BINS) -> float:
    """Return the debiased l2 calibration error over equal-mass bins of at least two rows."""
    n_rows = len(confidence)
    index = _by_mass(confidence if order is None else order, max(1, min(n_bins, n_rows // 2)))
    count, gap, hits = np.bincount(index), np.bincount(index, confidence - correct), np.bincount(index, correct)
    filled, many = np.maximum(count, 1), np.maximum(count - 1, 1)
    accuracy = hits / filled
    square = np.square(gap / filled) - accuracy * (1 - accuracy) / many
    return float(np.sqrt(max((np.where(count > 1, count, 0) * square).sum() / n_rows, 0.0)))


def classwise_ece(probs: Floats, targets: Integers, *, n_bins: int = N_BINS) -> float:
    """Return the mean over classes c of the ECE of p_c against 1[y = c] (Nixon et al. 2019); probs (M, C)."""
    return float(np.mean([ece(p, (targets == c).astype(np.float64), n_bins=n_bins) for c, p in enumerate(probs.T)]))


def equal_width_bins(confidence: Floats, correct: Floats, *, n_bins: int = N_BINS) -> Bins:
    """Return the non-empty bins (k/B, (k+1)/B] of M rows."""
    return _bins(confidence, correct, _by_width(confidence, n_bins))


def equal_mass_bins(confidence: Floats, correct: Floats, order: Floats | None = None, *, n_bins: int = N_BINS) -> Bins:
    """Return bins of consecutive rows in order of confidence, as equal in size as ties allow."""
    return _bins(confidence, correct, _by_mass(confidence if order is None else order, n_bins))


def _by_width(confidence: Floats, n_bins: int) -> Integers:
    return np.searchsorted(np.linspace(0, 1, n_bins + 1)[1:-1], confidence, side="left").astype(np.int64)


def _by_mass(confidence: Floats, n_bins: int) -> Integers:
    """Return the bin of each row: the number of upper bin edges below its confidence."""
    n_rows = len(confidence)
    lasts = [part[-1] for part in np.array_split(np.arange(n_rows), min(n_bins, n_rows))[:-1]]
    return np.searchsorted(np.sort(confidence)[lasts], confidence, side="left").astype(np.int64)


def _absolute_error(gap: Floats, index: Integers) -> float:
    return float(np.abs(np.bincount(index, gap)).sum() / len(gap))


def _bins(confidence: Floats, correct: Floats, index: Integers) -> Bins:
    count = np.bincount(index).astype(np.float64)
    filled = count > 0
    confidences, hits = (np.bincount(index, values)[filled] / count[filled] for values in (confidence, correct))
    return Bins(confidences, hits, count[filled])
