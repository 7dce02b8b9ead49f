"""Detection of out-of-distribution (OOD) rows by a score. OOD is the positive class: a high score indicates OOD.

`inside` (M,) and `outside` (K,) are the scores of in-distribution and OOD rows. Rows of equal score are on the
same side of every threshold. A constant score has AUROC ½, FPR95 1 and, as AUPR, the share of OOD rows. Without rows
inside or outside nothing is detected or missed, and every score is NaN.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from estimators.option_checks import checked_number

__all__ = ["auroc", "average_precision", "fpr_at_recall"]

Floats = NDArray[np.float64]
_ROUNDING = 1e-9
"""Slack of a count of rows: 0.95 · 20 = 19 rows must not be missed by rounding."""


def auroc(inside: Floats, outside: Floats) -> float:
    """Return P(outside score > inside score) + ½ P(equal) over all pairs; higher is better."""
    if _is_empty(inside, outside):
        return float("nan")
    return float(roc_auc_score(*_labelled(inside, outside)))


def average_precision(inside: Floats, outside: Floats) -> float:
    """Return AUPR as Σₜ (recallₜ − recallₜ₋₁) precisionₜ over decreasing thresholds t; higher is better.

    The sum is not interpolated. It depends on the share of OOD rows, so compare it on one set only.
    """
    if _is_empty(inside, outside):
        return float("nan")
    return float(average_precision_score(*_labelled(inside, outside)))


def fpr_at_recall(inside: Floats, outside: Floats, *, recall: float = 0.95) -> float:
    """Return the share of in-distribution rows above the highest threshold that finds `recall` of the OOD rows.

    Lower is better. Liang et al. (2018) fix the recall of in-distribution rows instead, which is another number.

    Args:
        inside: scores of in-distribution rows, (M,).
        outside: scores of OOD rows, (K,).
        recall: share of the OOD rows that must be found, in (0, 1].

    Returns:
        The share; NaN without rows inside or outside.

    Raises:
        OptionError: for a recall outside (0, 1], such as 95 for 95 %.
    """
    recall = checked_number("recall", recall, above=0, at_most=1, remedy="a share of the OOD rows, such as 0.95.")
    if _is_empty(inside, outside):
        return float("nan")
    fpr, tpr, _ = roc_curve(*_labelled(inside, outside), drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= recall - _ROUNDING / len(outside))])


def _is_empty(inside: Floats, outside: Floats) -> bool:
    return not (len(inside) and len(outside))


def _labelled(inside: Floats, outside: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return labels (1 for OOD) and the ranks of the scores, which are finite for a log-entropy of −inf, too."""
    _, ranks = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    return np.repeat([0, 1], [len(inside), len(outside)]), ranks
