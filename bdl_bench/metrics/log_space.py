"""Logarithms of probabilities in float64, which do not saturate at 0 or 1 and do not tie by rounding.

Log-probabilities are (..., C) with the classes last. The logarithms of the other
classes distinguish a row whose top class has probability 1 − 1e-100 from one with 1 − 1e-200.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

__all__ = ["log_entropy", "log_odds_of_top", "log_sigmoid", "log_softmax", "logs"]

Floats = NDArray[np.float64]
_NEAR_ONE = float(np.log1p(-1e-6))
"""log p from which 1 − p is summed over the other classes: below it, 1 − p has ten digits or more."""
_VANISHING = -40.0
"""log q below which q + q²/2 is q in float64."""


def logs(probs: Floats) -> Floats:
    """Return log p, −inf for p = 0."""
    with np.errstate(divide="ignore"):
        values: Floats = np.log(probs)
    return values


def log_softmax(logits: Floats) -> Floats:
    """Return log p along the last axis, accurate at the top: log p_top = −log(1 + Σ_{c≠top} exp(f_c − f_top))."""
    shifted = logits - logits.max(-1, keepdims=True)
    weights = np.exp(shifted)
    np.put_along_axis(weights, shifted.argmax(-1)[..., None], 0.0, axis=-1)
    values: Floats = shifted - np.log1p(weights.sum(-1, keepdims=True))
    return values


def log_sigmoid(log_odds: Floats) -> Floats:
    """Return log p of a log-odds log p/(1 − p)."""
    values: Floats = -np.logaddexp(0.0, -log_odds)
    return values


def log_odds_of_top(log_probs: Floats) -> Floats:
    """Return log p/(1 − p) of the most probable class, (...), which orders rows by confidence without ties at p = 1."""
    top = log_probs.max(-1)
    odds: Floats = top - _log_of_rest(log_probs, top)
    return odds


def log_entropy(log_probs: Floats) -> Floats:
    """Return log(−Σ_c p_c log p_c), (...), which orders rows by entropy, also below an entropy of 1e-308."""
    top = np.minimum(log_probs.max(-1), 0.0)
    rest = _log_of_rest(log_probs, top)
    # A class of probability 0 adds p log p → 0. Written as log p = 0 its term is log 0, which adds nothing.
    finite = np.where(np.isneginf(log_probs), 0.0, np.minimum(log_probs, 0.0))
    log_surprise = logs(-finite)
    # −log(1 − q) = q + q²/2 + ... of the top class: its logarithm is log q if q is negligible beside 1.
    of_top = np.where(rest < _VANISHING, rest, logs(-top))
    np.put_along_axis(log_surprise, log_probs.argmax(-1)[..., None], of_top[..., None], axis=-1)
    return _log_sum(finite + log_surprise)


def _log_of_rest(log_probs: Floats, top: Floats) -> Floats:
    """Return log(1 − p) of the top class: from p, so that equal p tie, or from the other classes if p is near 1."""
    others = np.array(log_probs)
    np.put_along_axis(others, log_probs.argmax(-1)[..., None], -np.inf, axis=-1)
    # Sorted, so that equal probabilities in another order give the same sum to the last bit.
    summed = _log_sum(np.sort(others, axis=-1))
    by_top = np.log1p(-np.exp(np.minimum(top, _NEAR_ONE)))
    values: Floats = np.where(top > _NEAR_ONE, summed, by_top)
    return values


def _log_sum(values: Floats) -> Floats:
    """Return log Σ exp along the last axis, −inf if every term is −inf."""
    with np.errstate(divide="ignore"):
        summed: Floats = np.asarray(logsumexp(values, axis=-1), dtype=np.float64)
    return summed
