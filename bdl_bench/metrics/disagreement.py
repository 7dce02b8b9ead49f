"""How much the predictions of two methods differ at the same rows, whatever the labels are.

The distance is 0 for equal predictions. It says which methods are different models in practice, and so which may be
worth combining; it does not say which is right.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["mean_difference", "top_label_disagreement", "total_variation"]

Floats = NDArray[np.float64]


def top_label_disagreement(probs: Floats, others: Floats) -> float:
    """Return the share of rows whose most probable classes differ.

    Args:
        probs: probabilities of the classes, (M, C).
        others: of another method at the same rows, (M, C).

    Returns:
        A share between 0 and 1.
    """
    return float((probs.argmax(-1) != others.argmax(-1)).mean())


def total_variation(probs: Floats, others: Floats) -> Floats:
    """Return ½ Σ_c |p_c − q_c| of each row, the largest difference of the probability of any event.

    Args:
        probs: probabilities of the classes, (..., C).
        others: of another method at the same rows, (..., C).

    Returns:
        Total variation between 0 and 1, (...).
    """
    distance: Floats = 0.5 * np.abs(probs - others).sum(-1)
    return distance


def mean_difference(mean: Floats, variance: Floats, other_mean: Floats, other_variance: Floats) -> float:
    """Return the mean of |m₁ − m₂| in units of the predictive standard deviation √((v₁ + v₂)/2).

    Args:
        mean: predictive mean, (M, C).
        variance: predictive variance with noise, (M, C).
        other_mean: of another method at the same rows, (M, C).
        other_variance: its predictive variance, (M, C).

    Returns:
        The mean over rows and outputs.
    """
    return float((np.abs(mean - other_mean) / np.sqrt((variance + other_variance) / 2)).mean())
