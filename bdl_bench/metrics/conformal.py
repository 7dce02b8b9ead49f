"""Split conformal prediction for metrics: sets calibrated on n validation rows, and their coverage and size.

Scores, thresholds and sets are those of `estimators.SplitConformal` with its default scores. Coverage is a check, and
the size of the sets is the result: a better prediction has smaller sets.

    classes:     s = −log p_y               the set of all classes with −log p_c <= q  (Sadinle et al. 2019)
    regression:  s = |y − m|/s.d.           the interval m ± q · s.d.                  (Lei et al. 2018)
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from estimators.calibration.conformal_scores import (
    conformal_threshold,
    has_threshold,
    lac_scores,
    scaled_residuals,
    within_threshold,
)

__all__ = ["LEVEL", "class_sets", "enough_rows", "intervals"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LEVEL = 0.9
"""Nominal coverage of conformal sets."""


def enough_rows(n: int) -> bool:
    """Return whether n validation rows have a finite threshold at `LEVEL`."""
    return has_threshold(n, level=LEVEL)


def intervals(
    targets: Floats, mean: Floats, std: Floats, validation: tuple[Floats, Floats, Floats], *, level: float = LEVEL
) -> tuple[Floats, Floats]:
    """Return whether each target is inside its interval, and the width of that. Every output has its own threshold.

    Args:
        targets: of M test rows, (M, C).
        mean: predicted means, (M, C).
        std: predicted standard deviations, (M, C).
        validation: targets, means and standard deviations of n validation rows, (n, C) each.
        level: nominal coverage, in (0, 1).

    Returns:
        1 or 0, and widths, (M, C) each.
    """
    known, test = (_scores(*arrays) for arrays in (validation, (targets, mean, std)))
    threshold = conformal_threshold(known, level=level)
    inside: Floats = within_threshold(test, threshold).double().numpy()
    return inside, 2 * threshold.numpy() * std


def _scores(targets: Floats, mean: Floats, std: Floats) -> torch.Tensor:
    return scaled_residuals(*map(torch.from_numpy, (targets, mean, std)))


def class_sets(
    log_probs: Floats, validation_log_probs: Floats, validation_targets: Integers, *, level: float = LEVEL
) -> NDArray[np.bool_]:
    """Return which classes are in the set of each row, by the probability of a class.

    Args:
        log_probs: of M test rows, (M, C).
        validation_log_probs: of n validation rows, (n, C).
        validation_targets: class indices, (n,).
        level: nominal coverage, in (0, 1).

    Returns:
        Whether each class is in the set, (M, C). A set may be empty.
    """
    known = lac_scores(torch.from_numpy(validation_log_probs))
    labels = torch.from_numpy(validation_targets)
    threshold = conformal_threshold(known.gather(1, labels[:, None])[:, 0], level=level)
    inside: NDArray[np.bool_] = within_threshold(lac_scores(torch.from_numpy(log_probs)), threshold).numpy()
    return inside
