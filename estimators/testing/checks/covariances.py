"""Covariance, samples, and the variance of functionals."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from estimators.runtime.rng import seeded_random_state
from estimators.testing import formulas
from estimators.testing.estimator_under_test import EstimatorUnderTest, as_array, if_supported
from estimators.testing.networks import Array
from estimators.testing.outcomes import CheckFailure, NotApplicable
from estimators.testing.registry import check

__all__: list[str] = []


@check("covariance")
def covariance(subject: EstimatorUnderTest) -> None:
    """(M, C, C), symmetric, positive semidefinite, with the variance on its diagonal."""
    case = subject.cases["classification"]
    found, variance = subject.covariance(case), subject.variance(case)
    m, c = variance.shape
    if found.shape != (m, c, c):
        raise CheckFailure(f"a covariance of shape {(m, c, c)}", received=f"{found.shape}", fault="rows and outputs.")
    fault = "blocks transposed or mixed up in a reshape, or a covariance of its own."
    diagonal = np.einsum("mcc->mc", found)
    slack = max(1e-6, subject.claims.tolerance)
    subject.compare("the variance on the diagonal", diagonal, variance, fault=fault, slack=slack)
    scale = float(np.abs(found).max())
    skew = float(np.abs(found - found.transpose(0, 2, 1)).max())
    least = float(np.linalg.eigvalsh(found).min())
    if skew > 1e-8 * scale or least < -1e-8 * scale:
        raise CheckFailure(
            "a symmetric, positive semidefinite covariance",
            received=f"a skew part of {skew:.3g}, a smallest eigenvalue of {least:.3g}, entries up to {scale:.3g}",
            fault=fault,
        )


@check("sample-shape")
def sample_shape(subject: EstimatorUnderTest) -> None:
    """Samples are (S, M, C)."""
    case = subject.cases["classification"]
    found = subject.samples(case)
    expected = (subject.claims.n_samples, len(case.query), 3)
    if found.shape != expected:
        raise CheckFailure(f"samples of shape {expected}", received=f"{found.shape}", fault="samples come first.")


@check("sample-moments")
def sample_moments(subject: EstimatorUnderTest) -> None:
    """Mean and covariance of the samples are predict's mean and the covariance, within five standard errors."""
    case = subject.cases["classification"]
    samples = subject.samples(case)
    s, variance = len(samples), subject.variance(case)
    mean = as_array(subject.fitted(case).predict(case.queries).mean)
    error = np.sqrt(np.maximum(variance, 0) / s)
    off = np.abs(samples.mean(0) - mean)
    if (off > 5 * error + 1e-9 * np.abs(mean).max()).any():
        raise CheckFailure(
            f"samples around the mean, to {5 * error.max():.2g}",
            received=f"a mean of samples {off.max():.3g} off",
            fault="samples of the displacement without f(x), or around another network.",
        )
    centred = samples - mean
    found = np.einsum("smc,smd->mcd", centred, centred) / s
    _compare_moments(found, _covariance(subject), s, "the covariance between outputs")


def _covariance(subject: EstimatorUnderTest) -> Array:
    """(M, C, C); without one, the diagonal, and NaN elsewhere."""
    case = subject.cases["classification"]
    try:
        return subject.covariance(case)
    except NotApplicable:
        variance = subject.variance(case)
        return np.where(np.eye(variance.shape[1], dtype=bool), variance[:, :, None], np.nan)


def _compare_moments(found: Array, expected: Array, n_samples: int, what: str) -> None:
    """Var of a sample covariance: (Σ_cc Σ_dd + Σ_cd²) / S."""
    diagonal = np.einsum("...cc->...c", expected)
    products = diagonal[..., :, None] * diagonal[..., None, :]
    error = np.sqrt((products + np.nan_to_num(expected) ** 2) / n_samples)
    known = np.isfinite(expected)
    off = np.abs(found - expected)[known] - 6 * error[known] - 1e-12
    if off.size and off.max() > 0:
        worst = int(np.argmax(off))
        raise CheckFailure(
            f"{what} of {n_samples} samples: {expected[known][worst]:.4g} ± {error[known][worst]:.2g}",
            received=f"{found[known][worst]:.4g}",
            fault="samples of another posterior: A⁻¹ in place of its root, a lower factor where an upper one belongs.",
        )


@check("sample-joint")
def sample_joint(subject: EstimatorUnderTest) -> None:
    """Samples are functions: rows of one sample go together, with the exact covariance between rows."""
    case = subject.cases["classification"]
    samples = subject.samples(case)
    expected = formulas.covariance(case, subject.exact)
    centred = (samples - case.network.outputs(case.query)).reshape(len(samples), -1)
    found = centred.T @ centred / len(samples)
    _compare_moments(found, expected, len(samples), "the covariance between rows")


@check("sample-seed")
def sample_seed(subject: EstimatorUnderTest) -> None:
    """One seed gives one set of samples, whatever the global random state."""
    case = subject.cases["classification"]
    estimator = subject.fitted(case)

    def sampled(state: int) -> Array:
        with seeded_random_state(state):
            return as_array(if_supported(lambda: estimator.sample(case.queries, 3, seed=5)))

    first, second = sampled(1), sampled(2)
    if not np.array_equal(first, second):
        raise CheckFailure(
            "the same samples for the same seed",
            received=f"a difference of {np.abs(first - second).max():.3g}",
            fault="the generator that is passed to _sample is not used everywhere.",
        )


@check("sample-seed-varies")
def sample_seed_varies(subject: EstimatorUnderTest) -> None:
    """Another seed gives others."""
    case = subject.cases["classification"]
    estimator = subject.fitted(case)
    first, second = (as_array(if_supported(lambda s=s: estimator.sample(case.queries, 3, seed=s))) for s in (5, 6))  # type: ignore[misc]
    if np.array_equal(first, second) and subject.variance(case).max() > 0:
        raise CheckFailure(
            "other samples for another seed",
            received="the same ones",
            fault="a generator of its own in _sample, with a fixed seed.",
        )


def _functional(f: Tensor) -> Tensor:
    """A margin, and a sum of squares."""
    return torch.stack([f[0] - f[1], f.square().sum()])


@check("functional")
def functional(subject: EstimatorUnderTest) -> None:
    """variance(x, of=g) is diag(G Σ Gᵀ), G by hand."""
    case = subject.cases["classification"]
    estimator = subject.fitted(case)
    received = as_array(if_supported(lambda: estimator.variance(case.queries, of=_functional)))
    f = as_array(estimator.predict(case.queries).mean)
    margin = np.broadcast_to(np.array([1.0, -1.0, 0.0]), f.shape)
    slopes = np.stack([margin, 2 * f], axis=1)  # G (M, 2, 3)
    expected = np.einsum("mdc,mce,mde->md", slopes, subject.covariance(case), slopes)
    fault = "of= is not passed on, or g is applied to variances."
    slack = max(1e-6, subject.claims.tolerance)
    subject.compare("the delta method with covariance(x)", received, expected, fault=fault, slack=slack)
