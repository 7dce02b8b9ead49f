"""Scores of class probabilities, one number an example: probs (M, C), rows summing to 1; targets (M,) class indices."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr

__all__ = ["as_two_classes", "brier", "confidence", "correct", "entropy", "nll"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def nll(probs: Floats, targets: Integers) -> Floats:
    """−log p(y), nats, (M,); infinite where a class was given probability 0."""
    with np.errstate(divide="ignore"):
        scores: Floats = -np.log(_of_target(probs, targets))
    return scores


def brier(probs: Floats, targets: Integers) -> Floats:
    """Σ_c (p_c − 1[y = c])², between 0 and 2, (M,)."""
    scores: Floats = np.square(probs).sum(-1) - 2 * _of_target(probs, targets) + 1
    return scores


def correct(probs: Floats, targets: Integers) -> Floats:
    """1 where the most probable class is the target, else 0, (M,)."""
    hits: Floats = (probs.argmax(-1) == targets).astype(np.float64)
    return hits


def confidence(probs: Floats) -> Floats:
    """The probability of the most probable class, (M,)."""
    top: Floats = probs.max(-1)
    return top


def entropy(probs: Floats) -> Floats:
    """−Σ_c p_c log p_c, nats, (M,)."""
    nats: Floats = entr(probs).sum(-1)
    return nats


def as_two_classes(probs: Floats, targets: Floats) -> tuple[Floats, Integers]:
    """Independent Bernoulli outputs (M, C) as M·C examples of two classes: probs (M·C, 2), targets (M·C,)."""
    p = probs.reshape(-1)
    return np.stack([1 - p, p], axis=-1), targets.reshape(-1).astype(np.int64)


def _of_target(probs: Floats, targets: Integers) -> Floats:
    return probs[np.arange(len(targets)), targets]
