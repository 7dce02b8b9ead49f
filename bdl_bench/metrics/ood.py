"""Telling out-of-distribution rows from in-distribution ones by a score. OOD is positive: a high score says OOD.

`inside` (..., M) and `outside` (..., K) are scores of in- and out-of-distribution rows; each result is (...).
Rows of equal score fall on the same side of every threshold: a constant score has AUROC ½, FPR95 1 and, as AUPR, the
share of OOD rows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics.ties import Falling, falling

__all__ = ["auroc", "average_precision", "fpr_at_recall"]

Floats = NDArray[np.float64]


def auroc(inside: Floats, outside: Floats) -> Floats:
    """P(outside score > inside score) + ½ P(equal), over all pairs; higher is better."""
    order, is_ood = _ordered(inside, outside)
    found = order.expected(is_ood)
    pairs = (1 - found) * (np.cumsum(found, -1) - found / 2)
    area: Floats = pairs.sum(-1) / (inside.shape[-1] * outside.shape[-1])
    return area


def average_precision(inside: Floats, outside: Floats) -> Floats:
    """AUPR as Σₜ (recallₜ − recallₜ₋₁) precisionₜ over falling thresholds t; higher is better.

    It is not interpolated, and depends on the share of OOD rows: compare it on one set only.
    """
    order, is_ood = _ordered(inside, outside)
    precision = order.accepted(is_ood) / (order.last + 1)
    area: Floats = (order.expected(is_ood) * precision).sum(-1) / outside.shape[-1]
    return area


def fpr_at_recall(inside: Floats, outside: Floats, *, recall: float = 0.95) -> Floats:
    """The share of in-distribution rows called OOD at the highest threshold that finds `recall` of the OOD rows.

    Lower is better. (Liang et al. 2018 hold the recall of in-distribution rows instead; that is another number.)
    """
    order, is_ood = _ordered(inside, outside)
    found = order.accepted(is_ood)
    # The slack keeps 0.95 · 20 = 19 rows from being missed by rounding.
    reached = found >= recall * outside.shape[-1] - 1e-9
    place = reached.argmax(-1)[..., None]
    called = order.last + 1 - found
    share: Floats = np.take_along_axis(called, place, -1)[..., 0] / inside.shape[-1]
    return share


def _ordered(inside: Floats, outside: Floats) -> tuple[Falling, Floats]:
    """All rows in falling order of score, and which of them are OOD before they were ordered."""
    scores = np.concatenate([inside, outside], axis=-1)
    return falling(scores), np.repeat([0.0, 1.0], [inside.shape[-1], outside.shape[-1]])
