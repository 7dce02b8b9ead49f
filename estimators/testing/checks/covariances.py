"""Checks of the covariance, of samples, and of the variance of functionals."""

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

__all__ = ["compare_moments"]


@check("covariance")
def covariance(tested: EstimatorUnderTest) -> None:
    """The covariance is (M, C, C), symmetric, positive semidefinite, with the variance on its diagonal."""
    case = tested.cases["classification"]
    found, variance = tested.covariance(case), tested.variance(case)
    m, c = variance.shape
    if found.shape != (m, c, c):
        raise CheckFailure(
            f"a covariance of shape {(m, c, c)}", received=f"{found.shape}", fault="rows and outputs exchanged."
        )
    fault = "blocks transposed or exchanged in a reshape, or a separately computed covariance."
    diagonal = np.einsum("mcc->mc", found)
    rtol = max(1e-6, tested.capabilities.tolerance)
    tested.compare("the variance on the diagonal", diagonal, variance, fault=fault, rtol=rtol)
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
def sample_shape(tested: EstimatorUnderTest) -> None:
    """Samples are (S, M, C)."""
    case = tested.cases["classification"]
    found = tested.samples(case)
    expected = (tested.capabilities.n_samples, len(case.query), 3)
    if found.shape != expected:
        raise CheckFailure(f"samples of shape {expected}", received=f"{found.shape}", fault="samples come first.")


@check("sample-moments")
def sample_moments(tested: EstimatorUnderTest) -> None:
    """Samples have the mean of predict and the covariance, within five standard errors."""
    case = tested.cases["classification"]
    samples = tested.samples(case)
    s, variance = len(samples), tested.variance(case)
    mean = as_array(tested.fitted(case).predict(case.queries).mean)
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
    compare_moments(found, _covariance(tested), s, "the covariance between outputs")


def _covariance(tested: EstimatorUnderTest) -> Array:
    """Return the covariance (M, C, C), or the variance on its diagonal and NaN elsewhere if there is none."""
    case = tested.cases["classification"]
    try:
        return tested.covariance(case)
    except NotApplicable:
        variance = tested.variance(case)
        return np.where(np.eye(variance.shape[1], dtype=bool), variance[:, :, None], np.nan)


def compare_moments(found: Array, expected: Array, n_samples: int, what: str) -> None:
    """Compare within six standard errors; the variance of a sample covariance is (Σ_cc Σ_dd + Σ_cd²) / S."""
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
            fault="samples of another posterior: A⁻¹ instead of its root, or a lower instead of an upper factor.",
        )


@check("sample-joint")
def sample_joint(tested: EstimatorUnderTest) -> None:
    """Samples are jointly distributed over rows, with the exact covariance between rows."""
    case = tested.cases["classification"]
    samples = tested.samples(case)
    expected = formulas.covariance(case, tested.exact)
    centred = (samples - case.network.outputs(case.query)).reshape(len(samples), -1)
    found = centred.T @ centred / len(samples)
    compare_moments(found, expected, len(samples), "the covariance between rows")


@check("sample-seed")
def sample_seed(tested: EstimatorUnderTest) -> None:
    """One seed gives one set of samples, whatever the global random state."""
    case = tested.cases["classification"]
    estimator = tested.fitted(case)

    def sampled(state: int) -> Array:
        with seeded_random_state(state):
            return as_array(if_supported(lambda: estimator.sample(case.queries, 3, seed=5)))

    first, second = sampled(1), sampled(2)
    if not np.array_equal(first, second):
        raise CheckFailure(
            "the same samples for the same seed",
            received=f"a difference of {np.abs(first - second).max():.3g}",
            fault="_sample does not use its generator for every random number.",
        )


@check("sample-seed-varies")
def sample_seed_varies(tested: EstimatorUnderTest) -> None:
    """Another seed gives other samples."""
    case = tested.cases["classification"]
    estimator = tested.fitted(case)
    first, second = (as_array(if_supported(lambda s=s: estimator.sample(case.queries, 3, seed=s))) for s in (5, 6))  # type: ignore[misc]
    if np.array_equal(first, second) and tested.variance(case).max() > 0:
        raise CheckFailure(
            "other samples for another seed",
            received="the same ones",
            fault="_sample makes a generator with a fixed seed.",
        )


def _functional(f: Tensor) -> Tensor:
    """Return a margin and a sum of squares."""
    return torch.stack([f[0] - f[1], f.square().sum()])


@check("functional")
def functional(tested: EstimatorUnderTest) -> None:
    """variance(x, of=g) is diag(G Σ Gᵀ) with G = ∂g/∂f."""
    case = tested.cases["classification"]
    estimator = tested.fitted(case)
    received = as_array(if_supported(lambda: estimator.variance(case.queries, of=_functional)))
    f = as_array(estimator.predict(case.queries).mean)
    margin = np.broadcast_to(np.array([1.0, -1.0, 0.0]), f.shape)
    slopes = np.stack([margin, 2 * f], axis=1)  # G (M, 2, 3)
    expected = np.einsum("mdc,mce,mde->md", slopes, tested.covariance(case), slopes)
    fault = "of= is ignored, or g is applied to variances."
    rtol = max(1e-6, tested.capabilities.tolerance)
    tested.compare("the delta method with covariance(x)", received, expected, fault=fault, rtol=rtol)
