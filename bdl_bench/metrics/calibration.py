"""Calibration of top-label confidence: bins, and the expected calibration error over them.

    ECE = Σ_b (n_b / M) |mean confidence_b − accuracy_b|

Equal-width bins (Naeini et al. 2015; Guo et al. 2017) are (0, 1/B], ..., (1 − 1/B, 1]: a confidence of exactly 1 is in
the last one, and one of exactly 0 in the first. Equal-mass bins (Nixon et al. 2019, adaptive) hold equally many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bins", "adaptive_ece", "ece", "equal_mass_bins", "equal_width_bins"]

Floats = NDArray[np.float64]
N_BINS = 15


@dataclass(frozen=True)
class Bins:
    """Non-empty bins: mean confidence, accuracy and number of examples of each, (B,)."""

    confidence: Floats
    accuracy: Floats
    count: Floats

    @property
    def error(self) -> float:
        """The count-weighted mean of |confidence − accuracy|."""
        return float(np.average(np.abs(self.confidence - self.accuracy), weights=self.count))


def ece(confidence: Floats, correct: Floats, *, n_bins: int = N_BINS) -> float:
    """Expected calibration error over equal-width bins."""
    return equal_width_bins(confidence, correct, n_bins=n_bins).error


def adaptive_ece(confidence: Floats, correct: Floats, *, n_bins: int = N_BINS) -> float:
    """Expected calibration error over equal-mass bins."""
    return equal_mass_bins(confidence, correct, n_bins=n_bins).error


def equal_width_bins(confidence: Floats, correct: Floats, *, n_bins: int = N_BINS) -> Bins:
    """Bins (k/B, (k+1)/B], without the empty ones."""
    edges = np.linspace(0, 1, n_bins + 1)[1:-1]
    index = np.searchsorted(edges, confidence, side="left")
    return _bins(confidence, correct, [np.flatnonzero(index == b) for b in range(n_bins)])


def equal_mass_bins(confidence: Floats, correct: Floats, *, n_bins: int = N_BINS) -> Bins:
    """Consecutive examples in order of confidence, as equally many a bin as goes."""
    order = np.argsort(confidence, kind="stable")
    return _bins(confidence, correct, np.array_split(order, min(n_bins, len(order))))


def _bins(confidence: Floats, correct: Floats, members: list[NDArray[np.int64]]) -> Bins:
    filled = [m for m in members if len(m)]
    return Bins(
        np.array([confidence[m].mean() for m in filled]),
        np.array([correct[m].mean() for m in filled]),
        np.array([float(len(m)) for m in filled]),
    )
