"""Selective prediction: what is lost when only the most confident rows are answered. Along the last axis.

With rows in falling order of confidence, losses ℓ₁, ℓ₂, ... and coverage k/M,

    selective risk(k)   = (ℓ₁ + ... + ℓₖ) / k      the loss of an answered row
    generalized risk(k) = (ℓ₁ + ... + ℓₖ) / M      a row is answered and lost, jointly

    AURC  = (1/M) Σₖ selective risk(k)                                      Geifman, Uziel and El-Yaniv (2019)
    AUGRC = ∫ generalized risk d coverage, by the trapezoidal rule from 0   Traub et al. (2024), arXiv 2407.01032

For losses 0 and 1 with accuracy a, AUGRC = (1 − AUROC) a (1 − a) + (1 − a)²/2, AUROC that of telling right from wrong.
Ties in confidence: the expected value over all their orders, for both areas and both curves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics.ties import falling

__all__ = ["RiskCoverage", "augrc", "aurc", "excess_aurc", "risk_coverage"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RiskCoverage:
    """Both risks at each coverage 1/M, 2/M, ..., 1; each (M,)."""

    coverage: Floats
    selective_risk: Floats
    generalized_risk: Floats


def risk_coverage(confidence: Floats, losses: Floats) -> RiskCoverage:
    """The risk-coverage curves of M rows."""
    coverage = _shares(confidence)
    generalized = np.cumsum(falling(confidence).expected(losses), -1) / len(coverage)
    return RiskCoverage(coverage, generalized / coverage, generalized)


def aurc(confidence: Floats, losses: Floats) -> Floats:
    """Area under the curve of the selective risk, (...); lower is better, the risk itself for a constant confidence."""
    expected = falling(confidence).expected(losses)
    area: Floats = (np.cumsum(expected, -1) / np.arange(1, expected.shape[-1] + 1)).mean(-1)
    return area


def excess_aurc(confidence: Floats, losses: Floats) -> Floats:
    """AURC less that of the best order, which answers the rows of least loss first, (...); 0 at best."""
    return aurc(confidence, losses) - aurc(-losses, losses)


def augrc(confidence: Floats, losses: Floats) -> Floats:
    """Area under the curve of the generalized risk, (...): the mean risk of an undetected failure; lower is better."""
    expected = falling(confidence).expected(losses)
    area: Floats = (np.cumsum(expected, -1) - expected / 2).mean(-1) / expected.shape[-1]
    return area


def _shares(confidence: Floats) -> Floats:
    return np.arange(1, len(confidence) + 1) / len(confidence)
