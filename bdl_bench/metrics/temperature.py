"""The softmax temperature of class probabilities: p_c^(1/T), renormalised, and the T of the best log-likelihood.

The NLL at the optimal temperature (Ashukha et al. 2020, "Pitfalls of in-domain uncertainty estimation and ensembling in
deep learning") compares methods with their calibration taken out. For probabilities that are a softmax of logits it is
the usual division of the logits by T; for averaged or probit ones it acts on their logarithms, as in that paper.
All functions take log-probabilities (M, C).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from bdl_bench.metrics.classification import nll
from bdl_bench.metrics.log_space import log_softmax

__all__ = ["BOUNDS", "cross_validated_nll", "nll_at", "optimal_temperature", "tempered"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

BOUNDS = (0.01, 100.0)
"""The smallest and largest temperature that is looked at."""
_RUNS = 5


def tempered(log_probs: Floats, temperature: float) -> Floats:
    """log of p^(1/T) / Σ_c p_c^(1/T), (M, C); a probability of 0 stays 0."""
    return log_softmax(log_probs / temperature)


def nll_at(log_probs: Floats, targets: Integers, temperature: float) -> Floats:
    """−log of the tempered probability of the target, nats, (M,)."""
    return nll(log_probs if temperature == 1.0 else tempered(log_probs, temperature), targets)


def optimal_temperature(log_probs: Floats, targets: Integers) -> float:
    """The T within `BOUNDS` of the least mean NLL, which is convex in β = 1/T: the root of its slope in β.

        d NLL / dβ = mean (Σ_c q_c log p_c − log p_y),   q ∝ p^β

    A target of probability 0 costs infinitely much at every T, so that such rows have no say; 1.0 where all are such.
    """
    possible = np.isfinite(log_probs[np.arange(len(targets)), targets])
    if not possible.any():
        return 1.0
    logs, targets = log_probs[possible], targets[possible]
    of_target = logs[np.arange(len(logs)), targets].mean()
    finite = np.where(np.isfinite(logs), logs, 0.0)

    def slope(log_beta: float) -> float:
        q = np.exp(log_softmax(np.exp(log_beta) * logs))
        return float((q * finite).sum(-1).mean() - of_target)

    low, high = (-np.log(bound) for bound in reversed(BOUNDS))
    if slope(low) >= 0:
        return BOUNDS[1]
    if slope(high) <= 0:
        return BOUNDS[0]
    return float(np.exp(-brentq(slope, low, high, xtol=1e-12, rtol=1e-12)))


def cross_validated_nll(log_probs: Floats, targets: Integers, *, rows: int | None = None) -> Floats:
    """The NLL of each row at the temperature of the other half of the rows, mean over five random halvings, (M,).

    The protocol of Ashukha et al. (2020) where no validation rows are left. The halvings are the same for every method.
    `rows` says that the examples belong, in equal consecutive groups, to so many rows, which are halved whole.

    One row alone has no other half: it is scored at T = 1.
    """
    n = len(targets) if rows is None else rows
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
