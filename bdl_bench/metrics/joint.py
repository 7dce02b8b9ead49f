"""The joint log-likelihood of several labels, which rewards correlations between rows (Osband et al. 2022).

Marginal scores ignore whether two rows are wrong together. The joint NLL of τ labels does not:

    −(1/τ) log p(y₁, ..., y_τ | x₁, ..., x_τ) = −(1/τ) log E_f Π_i p(y_i | f(x_i))

For τ random rows it hardly differs from the marginal one in high dimension. In dyadic sampling, each of the τ rows is
one of two anchor rows with probability ½, so that rows repeat. With one label per row, a repeated row repeats its
label, as in the reference code of the authors. With n_k repetitions of anchor k,

    samples f_s:   log p = log (1/S) Σ_s exp Σ_k n_k log p(y_k | f_s(x_k))
    Gaussian f:    p = N(y; m, K + diag(σ²/n)) · Π_k (2πσ²)^(−(n_k − 1)/2) n_k^(−½)      over anchors with n_k > 0

The second line is exact: the mean of n equal labels with noise σ² is one label with noise σ²/n.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

__all__ = ["TAU", "anchor_counts", "joint_nll_of_gaussian", "joint_nll_of_samples"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

TAU = 10
"""Labels in a set, as in Osband et al. (2022, "Evaluating high-order predictive distributions in deep learning")."""


def anchor_counts(n_pairs: int, rng: np.random.Generator, *, tau: int = TAU) -> Integers:
    """Return how often each of two anchors is among τ rows, (n_pairs, 2): binomial with probability ½, and τ less it.

    Args:
        n_pairs: number of pairs of anchors.
        rng: generator of the counts.
        tau: number τ of rows in a set.

    Returns:
        The counts, which sum to τ.
    """
    first = rng.binomial(tau, 0.5, size=n_pairs)
    return np.stack([first, tau - first], axis=-1).astype(np.int64)


def joint_nll_of_samples(log_likelihood: Floats, counts: Integers) -> Floats:
    """Return the joint NLL per label of sets with repeated anchors, from function samples.

    Args:
        log_likelihood: log p(y_k | f_s(x_k)) of S samples, G sets and K anchors, (S, G, K), in nats.
        counts: repetitions n_k of each anchor, (G, K).

    Returns:
        Nats per label, (G,); infinite if every sample gives some label the probability 0.
    """
    # 0 · log 0 of an anchor without repetitions is 0, since its label is not in the set.
    repeated = np.where(counts == 0, 0.0, log_likelihood) * counts
    with np.errstate(divide="ignore"):
        log_joint = logsumexp(repeated.sum(-1), axis=0) - np.log(len(log_likelihood))
    scores: Floats = 0.0 - log_joint / counts.sum(-1)
    return scores


def joint_nll_of_gaussian(mean: Floats, covariance: Floats, noise: Floats, targets: Floats, counts: Integers) -> Floats:
    """Return the joint NLL per label of sets with repeated anchors, for a Gaussian function and Gaussian noise.

    Args:
        mean: m of G sets with K anchors and C outputs, (G, K, C).
        covariance: K of the function, without noise, (G, K, C, K, C).
        noise: σ² of each output, (G, K, C).
        targets: labels, (G, K, C).
        counts: repetitions n_k of each anchor, (G, K).

    Returns:
        Nats per label of C numbers, (G,).
    """
    n_sets, n_anchors, n_outputs = mean.shape
    size = n_anchors * n_outputs
    present = np.repeat(counts > 0, n_outputs, axis=-1)
    repeats = np.repeat(np.maximum(counts, 1), n_outputs, axis=-1)
    sigma2, residual = noise.reshape(n_sets, size), (targets - mean).reshape(n_sets, size)
    matrix = covariance.reshape(n_sets, size, size) + (sigma2 / repeats)[:, :, None] * np.eye(size)
    # An absent anchor becomes an independent one with variance 1 and residual 0, which adds ½ log 2π alone.
    both = present[:, :, None] & present[:, None, :]
    matrix = np.where(both, matrix, np.eye(size))
    residual = np.where(present, residual, 0.0)
    _, log_det = np.linalg.slogdet(matrix)
    solved = np.linalg.solve(matrix, residual[..., None])[..., 0]
    of_means = 0.5 * ((residual * solved).sum(-1) + log_det + present.sum(-1) * np.log(2 * np.pi))
    of_repeats = 0.5 * ((repeats - 1) * np.log(2 * np.pi * sigma2) + np.log(repeats))
    scores: Floats = (of_means + np.where(present, of_repeats, 0.0).sum(-1)) / counts.sum(-1)
    return scores
