"""Scores of the rows of a pool: epistemic variance, mutual information (BALD), and expected improvement."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx
from torch import Tensor

from bdl_bench.decisions.learner import Indices
from bdl_bench.problem.decision import Acquisition
from bdl_bench.problem.queries import Query
from bdl_bench.records.sample_scores import SampleScores
from estimators import UncertaintyEstimator
from estimators.errors import ModelError, UnsupportedError
from estimators.likelihoods.prediction import Prediction

__all__ = ["check_has_variance", "information_scores", "log_expected_improvement", "moments", "sample_rows_by_score",
           "top_rows", "uncertainty_scores"]  # fmt: skip

Floats = NDArray[np.float64]
_BATCH = 1000
"""Rows of the pool that are predicted at a time."""
_FAR = -1e3
"""z below which 1 − |z| √(π/2) erfcx(|z|/√2) is 1/z² to six digits, and its difference loses as many by round-off."""


def uncertainty_scores(estimator: UncertaintyEstimator, x: Tensor, acquisition: Acquisition) -> Floats:
    """Return the score of each row by which active learning queries.

    Args:
        estimator: a fitted method.
        x: inputs of the rows, (M, ...).
        acquisition: "variance" or "mutual_information".

    Returns:
        Scores, (M,), not negative.

    Raises:
        UnsupportedError: for "mutual_information", if the method has neither function samples nor covariances.
    """
    if acquisition == "variance":
        row: Floats = moments(estimator, x)[1].mean(-1)
        return row
    return information_scores(estimator, x)


def moments(estimator: UncertaintyEstimator, x: Tensor) -> tuple[Floats, Floats]:
    """Return mean and epistemic variance of the outputs, (M, C) each, in the units of the network's outputs."""
    found: list[Prediction] = [estimator.predict_uncalibrated(part) for part in x.split(_BATCH)]
    mean, variance = (
        np.concatenate([getattr(p, name).detach().cpu().double().numpy() for p in found])
        for name in ("mean", "epistemic_variance")
    )
    return mean, variance


def information_scores(estimator: UncertaintyEstimator, x: Tensor) -> Floats:
    """Return the mutual information between label and function, (M,) in nats, summed over Bernoulli outputs."""
    scores = SampleScores(estimator, estimator.predict_uncalibrated)
    parts = [scores.of_batch(Query(part, None), joint=False) for part in x.split(_BATCH)]
    if any("mutual_information" not in part for part in parts):
        raise UnsupportedError(
            "a method with function samples or covariances, which mutual information needs",
            received="one with variances alone",
            remedy="a method with samples, such as ensemble or laplace.",
        )
    found = np.concatenate([part["mutual_information"] for part in parts])
    summed: Floats = found if found.ndim == 1 else found.sum(-1)
    return summed


def check_has_variance(scores: Floats) -> None:
    """Check that a method has epistemic uncertainty at the rows of the pool.

    Args:
        scores: variances or mutual information, (M,).

    Raises:
        UnsupportedError: if all scores are 0, so that they order no rows.
        ModelError: if a score is not finite.
    """
    n = int((~np.isfinite(scores)).sum())
    if n:
        raise _not_finite(f"{n} of {len(scores)} that are not finite")
    if not scores.any():
        raise UnsupportedError(
            "a method with an epistemic variance, by which rows are chosen",
            received="a variance of 0 at every row of the pool",
            remedy="a method such as ensemble or laplace; the trained network alone is shown beside them.",
        )


def _not_finite(received: str) -> ModelError:
    return ModelError(
        "finite scores of the rows of the pool, such as variances",
        received=received,
        remedy="check the mean and variance of the method at the rows of the pool; its training may have diverged.",
    )


def log_expected_improvement(mean: Floats, variance: Floats, best: float) -> Floats:
    """Return log E[max(f − best, 0)] for f ~ N(mean, variance).

        EI = s (z Φ(z) + φ(z)),   z = (mean − best) / s        (Jones et al. 1998)

    For z < −1 the bracket is φ(z) (1 − |z| √(π/2) erfcx(|z|/√2)), whose logarithm does not underflow (Ament et al.
    2023), so that far rows are still ordered.

    Args:
        mean: (M,).
        variance: (M,), not negative.
        best: the largest target so far.

    Returns:
        (M,); −inf for variance 0 and a mean of at most `best`.
    """
    s = np.sqrt(variance)
    gap = mean - best
    with np.errstate(divide="ignore", invalid="ignore"):
        z = gap / s
        certain = np.log(np.maximum(gap, 0.0))
        uncertain = np.log(s) + _log_bracket(np.where(s > 0, z, 0.0))
    return np.where(s > 0, uncertain, certain)


def _log_bracket(z: Floats) -> Floats:
    """Return log(z Φ(z) + φ(z))."""
    t = np.maximum(-z, 0.0)
    tail = np.where(z < _FAR, 1 / np.square(np.minimum(z, _FAR)), 1 - t * np.sqrt(np.pi / 2) * erfcx(t / np.sqrt(2)))
    # z Φ(z) + φ(z) = z + (φ(z) − z Φ(−z)), the same function at −z, so that z >= 0 needs no cancellation.
    positive = np.maximum(z, 0.0)
    mirrored = 1 - positive * np.sqrt(np.pi / 2) * erfcx(positive / np.sqrt(2))
    log_density = -0.5 * np.square(z) - 0.5 * np.log(2 * np.pi)
    upper = np.log(positive + np.exp(log_density) * np.maximum(mirrored, 0.0), where=z >= 0, out=np.zeros_like(z))
    found: Floats = np.where(z >= 0, upper, log_density + np.log(tail))
    return found


def sample_rows_by_score(scores: Floats, queried: Indices, n: int, seed: tuple[int, ...]) -> Indices:
    """Return n rows that were not queried, sampled without replacement in proportion to their scores.

    These are the rows with the highest log score + Gumbel noise (Vieira 2014). A row with score 0 comes last.

    Args:
        scores: not negative, (M,).
        queried: rows that were queried.
        n: number of rows.
        seed: of the noise.

    Returns:
        The rows in the order in which they were drawn.
    """
    noise = np.random.default_rng(seed).gumbel(size=len(scores))
    with np.errstate(divide="ignore"):
        return top_rows(np.log(scores) + noise, queried, n)


def top_rows(scores: Floats, queried: Indices, n: int) -> Indices:
    """Return the n rows with the highest scores that were not queried; of equal ones the first.

    Args:
        scores: (M,); −inf comes last.
        queried: rows that were queried.
        n: number of rows.

    Returns:
        The rows, the highest score first.

    Raises:
        ModelError: for a score that is NaN, which has no order.
    """
    n_nan = int(np.isnan(scores).sum())
    if n_nan:
        raise _not_finite(f"{n_nan} of {len(scores)} that are NaN")
    free = np.setdiff1d(np.arange(len(scores)), np.array(queried, dtype=np.int64))
    order = free[np.argsort(-scores[free], kind="stable")]
    return tuple(int(i) for i in order[:n])
