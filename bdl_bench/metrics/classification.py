"""Scores of class probabilities, one number per example, from their logarithms.

`log_probs` (M, C) are float64, `targets` (M,) class indices. `bdl_bench.metrics.log_space.logs` converts
probabilities, `bdl_bench.metrics.log_space.log_softmax` converts logits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bdl_bench.metrics.log_space import log_sigmoid

__all__ = ["as_two_classes", "brier", "confidence", "correct", "entropy", "nll"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def nll(log_probs: Floats, targets: Integers) -> Floats:
    """Return −log p(y) in nats, (M,); infinite if the target has probability 0."""
    scores: Floats = 0.0 - log_probs[np.arange(len(targets)), targets]
    return scores


def brier(log_probs: Floats, targets: Integers) -> Floats:
    """Return the Brier score Σ_c (p_c − 1[y = c])², between 0 and 2, (M,).

    1 − p_y is summed over the other classes, so that a correct row of probability 1 − 1e-20 does not score exactly 0.
    """
    probs = np.exp(log_probs)
    probs[np.arange(len(targets)), targets] = 0.0
    scores: Floats = np.square(probs.sum(-1)) + np.square(probs).sum(-1)
    return scores


def correct(log_probs: Floats, targets: Integers) -> Floats:
    """Return 1 if the most probable class is the target, else 0, (M,)."""
    hits: Floats = (log_probs.argmax(-1) == targets).astype(np.float64)
    return hits


def confidence(log_probs: Floats) -> Floats:
    """Return the probability of the most probable class, (M,)."""
    top: Floats = np.exp(log_probs.max(-1))
    return top


def entropy(log_probs: Floats) -> Floats:
    """Return −Σ_c p_c log p_c in nats, (M,)."""
    finite = np.where(np.isneginf(log_probs), 0.0, log_probs)
    nats: Floats = 0.0 - (np.exp(log_probs) * finite).sum(-1)
    return nats


def as_two_classes(log_odds: Floats, targets: Floats) -> tuple[Floats, Integers]:
    """Return Bernoulli outputs (M, C) as M·C examples of two classes: log-probabilities (M·C, 2) and targets (M·C,)."""
    odds = log_odds.reshape(-1)
    return np.stack([log_sigmoid(-odds), log_sigmoid(odds)], axis=-1), targets.reshape(-1).astype(np.int64)
