"""Split conformal prediction: sets calibrated on n validation rows, and their coverage and size on test rows.

Scores s₁, ..., s_n of the validation rows measure how unusual a label is under the prediction. The set of a test row
has every label whose score is at most the k-th smallest of them, k = ⌈(n + 1) · level⌉. If validation and test rows are
exchangeable, it contains the label with a probability of at least `level`, and of less than level + 1/(n + 1) without
ties, whatever the prediction is (Vovk et al. 2005; Angelopoulos and Bates 2023). So coverage is a check, and the
size of the sets is the result: a better prediction has smaller sets.

    classes:     s = 1 − p_y                the set of all classes with p_c >= 1 − q  (Sadinle et al. 2019)
    regression:  s = |y − m|/s.d.           the interval m ± q · s.d.                 (Lei et al. 2018)

For k > n no finite threshold exists, and the set has every label.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVEL", "class_sets", "conformal_threshold", "has_threshold"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LEVEL = 0.9
"""Nominal coverage of conformal sets."""
_ROUNDING = 1e-9
"""Slack of a count of rows: (n + 1) · 0.9 = 9 rows must not be ten by rounding."""


def has_threshold(n: int, *, level: float = LEVEL) -> bool:
    """Return whether n validation rows have a finite threshold: from 9 rows on for 90 %."""
    return _rank(n, level) <= n


def conformal_threshold(scores: Floats, *, level: float = LEVEL) -> float:
    """Return the ⌈(n + 1) · level⌉-th smallest score of the validation rows.

    Args:
        scores: of n validation rows, (n,).
        level: nominal coverage, in (0, 1).

    Returns:
        The threshold q; infinite if there are too few rows.
    """
    k = _rank(len(scores), level)
    return float(np.sort(scores)[k - 1]) if k <= len(scores) else float("inf")


def class_sets(
    probs: Floats, validation_probs: Floats, validation_targets: Integers, *, level: float = LEVEL
) -> NDArray[np.bool_]:
    """Return which classes are in the set of each row, by the probability of a class.

    Args:
        probs: of M test rows, (M, C).
        validation_probs: of n validation rows, (n, C).
        validation_targets: class indices, (n,).
        level: nominal coverage, in (0, 1).

    Returns:
        Whether each class is in the set, (M, C). A set may be empty.
    """
    scores = 1 - validation_probs[np.arange(len(validation_targets)), validation_targets]
    inside: NDArray[np.bool_] = 1 - probs <= conformal_threshold(scores, level=level)
    return inside


def _rank(n: int, level: float) -> int:
    return int(np.ceil((n + 1) * level - _ROUNDING))
