"""Calibration of top-label confidence: bins, and calibration errors over them, along the last axis.

    ECE   = Σ_b (n_b / M) |confidence_b − accuracy_b|
    dECE² = Σ_b (n_b / M) [(confidence_b − accuracy_b)² − accuracy_b (1 − accuracy_b) / (n_b − 1)]

confidence_b and accuracy_b are means over the n_b rows of bin b. Equal-width bins (Naeini et al. 2015; Guo et al. 2017)
are [0, 1/B], (1/B, 2/B], ..., (1 − 1/B, 1]: a confidence of exactly 1 is in the last one, which is closed. Equal-mass
bins (Nixon et al. 2019, adaptive) hold equally many rows, but rows of equal confidence stay together, in the lower bin,
so that no result depends on the order of the rows. `order` is a score that orders rows as the confidence does and tells
those apart whose confidence is 1 in float64 (its log-odds); None: the confidence itself.

dECE is the debiased l2 error of Kumar, Liang and Ma (2019, "Verified uncertainty calibration") over equal-mass bins.
The term that is subtracted is what chance alone adds to the squared difference in a bin. As in their code, a bin of one
row counts zero, and a negative sum is an error of 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

__all__ = ["Bins", "adaptive_ece", "classwise_ece", "debiased_ece", "ece", "equal_mass_bins", "equal_width_bins"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
N_BINS = 15


@dataclass(frozen=True)
class Bins:
    """The points of a reliability diagram: mean confidence, accuracy and number of rows of each non-empty bin, (B,)."""

    confidence: Floats
    accuracy: Floats
    count: Floats

    @property
    def error(self) -> float:
        """The count-weighted mean of |confidence − accuracy|."""
        return float(np.average(np.abs(self.confidence - self.accuracy), weights=self.count))

    def interval(self, level: float = 0.95) -> tuple[Floats, Floats]:
        """Lower and upper ends of the Wilson score interval of each accuracy, (B,)."""
        z, p, n = float(norm.ppf(0.5 + level / 2)), self.accuracy, self.count
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        return centre - half, centre + half


def ece(confidence: Floats, correct: Floats, *, n_bins: int = N_BINS) -> Floats:
    """Expected calibration error over equal-width bins, (...)."""
    return _absolute_error(confidence - correct, _by_width(confidence, n_bins), n_bins)


def adaptive_ece(confidence: Floats, correct: Floats, order: Floats | None = None, *, n_bins: int = N_BINS) -> Floats:
    """Expected calibration error over equal-mass bins, (...)."""
    index = _by_mass(confidence if order is None else order, n_bins)
    return _absolute_error(confidence - correct, index, n_bins)


def debiased_ece(confidence: Floats, correct: Floats, order: Floats | None = None, *, n_bins: int = N_BINS) -> Floats:
    """The debiased l2 calibration error over equal-mass bins of two rows or more, (...)."""
    rows = confidence.shape[-1]
    n_bins = max(1, min(n_bins, rows // 2))
    index = _by_mass(confidence if order is None else order, n_bins)
    count, gap, hits = (_sums(index, v, n_bins) for v in (np.ones_like(confidence), confidence - correct, correct))
    filled, many = np.maximum(count, 1), np.maximum(count - 1, 1)
    accuracy = hits / filled
    square = np.square(gap / filled) - accuracy * (1 - accuracy) / many
    error: Floats = np.sqrt(np.maximum((np.where(count > 1, count, 0) * square).sum(-1) / rows, 0))
    return error


def classwise_ece(probs: Floats, targets: Integers, *, n_bins: int = N_BINS) -> Floats:
    """The mean over classes c of the ECE of p_c against 1[y = c] (Nixon et al. 2019); probs (M, C), targets (M,)."""
    one_hot = (targets[:, None] == np.arange(probs.shape[-1])).astype(np.float64)
    error: Floats = ece(probs.T, one_hot.T, n_bins=n_bins).mean(-1)
    return error


def equal_width_bins(confidence: Floats, correct: Floats, *, n_bins: int = N_BINS) -> Bins:
    """Bins (k/B, (k+1)/B] of M rows, without the empty ones."""
    return _bins(confidence, correct, _by_width(confidence, n_bins))


def equal_mass_bins(confidence: Floats, correct: Floats, order: Floats | None = None, *, n_bins: int = N_BINS) -> Bins:
    """Consecutive rows in order of confidence, as equally many a bin as ties allow."""
    return _bins(confidence, correct, _by_mass(confidence if order is None else order, n_bins))


def _by_width(confidence: Floats, n_bins: int) -> Integers:
    edges = np.linspace(0, 1, n_bins + 1)[1:-1]
    return np.searchsorted(edges, confidence, side="left").astype(np.int64)


def _by_mass(confidence: Floats, n_bins: int) -> Integers:
    """The bin of each row: how many of the last rows of lower bins it exceeds."""
    rows = confidence.shape[-1]
    lasts = [part[-1] for part in np.array_split(np.arange(rows), min(n_bins, rows))[:-1]]
    index = np.zeros(confidence.shape, dtype=np.int64)
    for edge in np.moveaxis(np.sort(confidence, axis=-1)[..., lasts], -1, 0):
        index += confidence > edge[..., None]
    return index


def _absolute_error(gap: Floats, index: Integers, n_bins: int) -> Floats:
    error: Floats = np.abs(_sums(index, gap, n_bins)).sum(-1) / gap.shape[-1]
    return error


def _sums(index: Integers, values: Floats, n_bins: int) -> Floats:
    """The sum of the values in each bin, (..., B)."""
    lead = index.shape[:-1]
    offset = n_bins * np.arange(int(np.prod(lead))).reshape(*lead, 1)
    places = (index + offset).reshape(-1)
    sums: Floats = np.bincount(places, values.reshape(-1), n_bins * int(np.prod(lead))).astype(np.float64)
    return sums.reshape(*lead, n_bins)


def _bins(confidence: Floats, correct: Floats, index: Integers) -> Bins:
    n_bins = int(index.max()) + 1
    count = _sums(index, np.ones_like(confidence), n_bins)
    filled = count > 0
    confidences, hits = (_sums(index, values, n_bins)[filled] / count[filled] for values in (confidence, correct))
    return Bins(confidences, hits, count[filled])
