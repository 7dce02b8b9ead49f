"""The mutual information between the label of a row and the function, from samples of the function.

    I(y; f | x) = H[E_f p(y | f(x))] − E_f H[p(y | f(x))]      in nats, between 0 and log C

It is the part of the predictive entropy that more training data would remove (Depeweg et al. 2018; BALD of Houlsby et
al. 2011): high where the samples disagree, 0 where all of them give the same probabilities, certain or not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from bdl_bench.metrics.classification import entropy

__all__ = ["mutual_information"]

Floats = NDArray[np.float64]


def mutual_information(log_probs: Floats) -> Floats:
    """Return the mutual information between label and function.

    Args:
        log_probs: log-probabilities of S function samples, (S, ..., C), with the classes last.

    Returns:
        Nats, (...), not negative. With S samples the estimate is too low by about (C − 1)/(2S).
    """
    # Of samples that are all equal, round-off must not make an order of rows.
    equal = (log_probs == log_probs[:1]).all((0, -1))
    mean = logsumexp(log_probs, axis=0) - np.log(len(log_probs))
    found: Floats = np.maximum(entropy(mean) - entropy(log_probs).mean(0), 0.0)
    return np.where(equal, 0.0, found)
