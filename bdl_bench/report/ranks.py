"""Average ranks over tasks, and how far apart they must be (Demšar 2006, section 3.2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata, studentized_range

__all__ = ["average_ranks", "critical_difference"]


def average_ranks(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean rank of each method over tasks, 1 the lowest score; ties share their mean rank.

    Args:
        scores: one mapping {method: score, lower is better} a task, all of the same methods.
    """
    methods = list(scores[0])
    ranks = np.mean([rankdata([task[m] for m in methods]) for task in scores], axis=0)
    return dict(zip(methods, map(float, ranks), strict=True))


def critical_difference(n_methods: int, n_tasks: int, *, level: float = 0.05) -> float:
    """The Nemenyi test: ranks differ at that level where they are q √(k(k + 1)/6N) or more apart."""
    q = studentized_range.ppf(1 - level, n_methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(n_methods * (n_methods + 1) / (6 * n_tasks)))
