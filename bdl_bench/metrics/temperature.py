"""The softmax temperature of class probabilities: p_c^(1/T), renormalised, and the T of the best log-likelihood.

The NLL at the optimal temperature (Ashukha et al. 2020, "Pitfalls of in-domain uncertainty estimation and ensembling in
deep learning") compares methods apart from their calibration. For probabilities that are a softmax of logits it is
the usual division of the logits by T; for averaged or probit ones it acts on their logarithms, as in that paper.
If every validation row is right, no temperature is optimal: the NLL falls as T → 0. Such rows choose T = 1, and no T
below `SMALLEST_TEMPERATURE` is considered, since a single wrong test row would then cost 1/T times its log-odds.

All functions take log-probabilities (M, C) and class indices (M,).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from bdl_bench.metrics.classification import nll
from bdl_bench.metrics.log_space import log_softmax
from estimators.baselines.temperature import best_temperature
from estimators.likelihoods import Categorical

__all__ = ["SMALLEST_TEMPERATURE", "cross_validated_nll", "nll_at", "optimal_temperature", "tempered"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SMALLEST_TEMPERATURE = 0.25
"""The smallest T of NLL*. It multiplies the log-odds of a prediction by four."""
_LOG_ZERO = -1e100
"""Stands for log 0: finite, so that its product with a probability of 0 is 0."""
_RUNS = 5
"""Random halvings of the cross-validation, as in Ashukha et al. (2020)."""


def tempered(log_probs: Floats, temperature: float) -> Floats:
    """Return the logarithm of p^(1/T) / Σ_c p_c^(1/T), (M, C); a probability of 0 stays 0."""
    return log_softmax(log_probs / temperature)


def nll_at(log_probs: Floats, targets: Integers, temperature: float) -> Floats:
    """Return −log of the tempered probability of the target, in nats, (M,)."""
    return nll(log_probs if temperature == 1.0 else tempered(log_probs, temperature), targets)


def optimal_temperature(log_probs: Floats, targets: Integers) -> float:
    """Return the T of the least mean NLL, between `SMALLEST_TEMPERATURE` and 100; 1 if no T is optimal.

    A target of probability 0 has infinite loss at every T, so such rows do not count; T = 1 if there are no others. If
    the target is the most probable class of every row, the NLL falls without end as T → 0, and T = 1.
    """
    possible = np.isfinite(log_probs[np.arange(len(targets)), targets])
    if not possible.any():
        return 1.0
    finite = np.maximum(log_probs[possible], _LOG_ZERO)
    if possible.all() and (finite.argmax(-1) == targets).all():
        return 1.0
    found = best_temperature(Categorical(), [(torch.from_numpy(finite), torch.from_numpy(targets[possible]))])
    return max(SMALLEST_TEMPERATURE, found)


def cross_validated_nll(log_probs: Floats, targets: Integers, *, n_rows: int | None = None) -> Floats:
    """Return the NLL of each example at the temperature of the other half, mean over five random halvings, (M,).

    This is the protocol of Ashukha et al. (2020). It is used only for records without validation rows; otherwise T is
    chosen on these. All methods have the same halvings. If several consecutive examples belong to each of `n_rows`
    rows, a row is never split. A single row is scored at T = 1.
    """
    n = len(targets) if n_rows is None else n_rows
    if n < 2:
        return nll(log_probs, targets)
    rng = np.random.default_rng(0)
    scores = np.zeros(len(targets))
    for _ in range(_RUNS):
        first = np.repeat(rng.permutation(n) < n // 2, len(targets) // n)
        for half in (first, ~first):
            temperature = optimal_temperature(log_probs[~half], targets[~half])
            scores[half] += nll_at(log_probs[half], targets[half], temperature) / _RUNS
    return scores
