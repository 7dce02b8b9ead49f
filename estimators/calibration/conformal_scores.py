"""Scores and thresholds of split conformal prediction, as functions of tensors.

Scores s₁, ..., s_n of the validation rows measure how unusual a label is under the prediction. The set of a test row
has every label whose score is at most the k-th smallest of them, k = ⌈(n + 1) · level⌉. If validation and test rows are
exchangeable, it contains the label with a probability of at least `level`, and of less than level + 1/(n + 1) without
ties, whatever the prediction is (Vovk et al. 2005; Angelopoulos and Bates 2023).

For k > n no finite threshold exists, and the set has every label.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from estimators.errors import DataError

__all__ = [
    "aps_scores",
    "conformal_threshold",
    "has_threshold",
    "lac_scores",
    "scaled_residuals",
    "two_classes",
    "within_threshold",
]

_ROUNDING = 1e-9
"""Slack of a count of rows: (n + 1) · 0.9 = 9 rows must not be ten by rounding."""

_ROUND_OFF = 1e-5
"""Relative error of a score by round-off, about 100 units of float32.

For a network of 200 hidden units, scores of a row alone and in a batch differ by one such unit. They differ by more if
outputs are large against the scores.
"""


def has_threshold(n: int, *, level: float) -> bool:
    """Return whether n validation rows have a finite threshold: from 9 rows on for 90 %."""
    return _rank(n, level) <= n


def conformal_threshold(scores: Tensor, *, level: float) -> Tensor:
    """Return the ⌈(n + 1) · level⌉-th smallest score of the validation rows.

    Args:
        scores: scores of the true labels of n validation rows, (n, ...).
        level: the nominal coverage, in (0, 1).

    Returns:
        The threshold of each column, (...); infinite if there are too few rows.
    """
    k = _rank(len(scores), level)
    if k > len(scores):
        return scores.new_full(scores.shape[1:], math.inf)
    return scores.kthvalue(k, dim=0).values


def within_threshold(scores: Tensor, threshold: Tensor) -> Tensor:
    """Return which labels are in a set: those whose scores are at most the threshold, up to round-off in float32.

    A row that is also a validation row may have a score equal to the threshold. Its outputs differ by round-off between
    batches, and must not decide whether the set has its label.

    Args:
        scores: scores of labels, of any shape.
        threshold: the threshold, of a shape that broadcasts with that of the scores.

    Returns:
        Booleans of the shape of the scores.
    """
    return scores <= threshold + _ROUND_OFF * threshold.abs()


def scaled_residuals(y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return |y − mean| / std, whose intervals are mean ± threshold · std (Lei et al. 2018, section 5.2).

    Args:
        y: targets (n, ...).
        mean: predicted means, (n, ...).
        std: predicted standard deviations, (n, ...); 1 for intervals of one width.

    Returns:
        The scores, (n, ...).

    Raises:
        DataError: for a standard deviation that is not positive.
    """
    if bool((std <= 0).any()):
        raise DataError(
            "positive standard deviations for scaled residuals",
            received=f"{int((std <= 0).sum())} of {std.numel()} that are not positive",
            remedy='score="residual", which needs no standard deviation.',
        )
    return (y - mean).abs() / std


def lac_scores(log_probs: Tensor) -> Tensor:
    """Return −log p of each class: the least ambiguous set-valued classifier, LAC or THR (Sadinle et al. 2019).

    The sets are those of the usual score 1 − p. Its logarithm has no ties of probabilities that are 1 in floating
    point.

    Args:
        log_probs: log p of each class, (..., C).

    Returns:
        The scores, (..., C).
    """
    return -log_probs


def aps_scores(log_probs: Tensor, u: Tensor | None = None) -> Tensor:
    """Return the score of each class by adaptive prediction sets, APS (Romano, Sesia and Candès 2020, section 2).

        s_c = Σ p of the classes before c + u · p_c,   classes in the order of decreasing p, ties by their index

    Args:
        log_probs: log p of each class, (..., C).
        u: numbers in [0, 1] for randomisation, (...). None: u = 1, the score without randomisation.

    Returns:
        The scores, (..., C).
    """
    probs, order = log_probs.exp().sort(dim=-1, descending=True, stable=True)
    share = 1.0 if u is None else u[..., None]
    ranked = probs.cumsum(-1) - (1 - share) * probs
    return torch.empty_like(ranked).scatter_(-1, order, ranked)


def two_classes(log_odds: Tensor) -> Tensor:
    """Return log p of both values 0 and 1 of Bernoulli outputs, (..., 2), from their log-odds (...)."""
    return torch.stack([F.logsigmoid(-log_odds), F.logsigmoid(log_odds)], dim=-1)


def _rank(n: int, level: float) -> int:
    return math.ceil((n + 1) * level - _ROUNDING)
