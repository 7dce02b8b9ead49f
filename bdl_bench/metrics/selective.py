"""Selective prediction: the risk if only the most confident rows are answered.

With rows in decreasing order of confidence, losses ℓ₁, ℓ₂, ... and coverage k/M,

    selective risk(k)   = (ℓ₁ + ... + ℓₖ) / k      mean loss of the answered rows
    generalized risk(k) = (ℓ₁ + ... + ℓₖ) / M      share of rows answered and wrong, for losses 0 and 1

    AURC  = (1/M) Σₖ selective risk(k)                                      Geifman, Uziel and El-Yaniv (2019)
    AUGRC = ∫ generalized risk d coverage, by the trapezoidal rule from 0   Traub et al. (2024), arXiv 2407.01032

For losses 0 and 1 with accuracy a, AUGRC = (1 − AUROC) a (1 − a) + (1 − a)²/2, with the AUROC of separating right rows
from wrong ones. Rows of equal confidence count with the mean loss of their group: the expectation over their orders.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["RiskCoverage", "augrc", "aurc", "excess_aurc", "risk_coverage"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RiskCoverage:
    """Selective and generalized risk at each coverage 1/M, 2/M, ..., 1; three arrays (M,)."""

    coverage: Floats
    selective_risk: Floats
    generalized_risk: Floats


def risk_coverage(confidence: Floats, losses: Floats) -> RiskCoverage:
    """Return the risk-coverage curves of M rows; `confidence` and `losses` are (M,)."""
    coverage = np.arange(1, len(losses) + 1) / len(losses)
    generalized = np.cumsum(_ordered(confidence, losses)) / len(losses)
    return RiskCoverage(coverage, generalized / coverage, generalized)


def aurc(confidence: Floats, losses: Floats) -> float:
    """Return the area under the selective risk; lower is better. It equals the mean loss if confidence is constant."""
    return float(risk_coverage(confidence, losses).selective_risk.mean())


def excess_aurc(confidence: Floats, losses: Floats) -> float:
    """Return AURC minus that of the best order, which answers the rows of least loss first; 0 at best."""
    return aurc(confidence, losses) - aurc(-losses, losses)


def augrc(confidence: Floats, losses: Floats) -> float:
    """Return the area under the generalized risk: the mean risk of an undetected failure; lower is better."""
    ordered = _ordered(confidence, losses)
    return float((np.cumsum(ordered) - ordered / 2).mean() / len(ordered))


def _ordered(confidence: Floats, losses: Floats) -> Floats:
    """Return the losses in decreasing order of confidence, tied rows with the mean loss of their group, (M,)."""
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    return np.repeat(np.bincount(group, losses) / sizes, sizes)
