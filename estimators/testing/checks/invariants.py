"""Checks of invariants of any Gaussian posterior over weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from estimators.testing import formulas
from estimators.testing.case_selection import fitted_cases
from estimators.testing.cases import Case
from estimators.testing.estimator_under_test import EstimatorUnderTest, as_array
from estimators.testing.networks import Array, FirstAndThird
from estimators.testing.outcomes import CheckFailure
from estimators.testing.registry import check

__all__: list[str] = []

_LEAST_SPREAD = 1e-9
"""The smallest difference between queries, relative to the largest variance."""
_LARGE_DELTA = 1e7
"""A prior precision at which the data have no influence."""


def _cases(tested: EstimatorUnderTest) -> list[Case]:
    """Return a case with Λ = I/σ² and one with a full Λ, if the estimator accepts them.

    They are linear for the exact Hessian: with a hidden layer, the data term may be indefinite and add variance.
    """
    if tested.capabilities.exact == "hessian":
        return fitted_cases(tested, "linear regression", "softmax regression")
    return fitted_cases(tested, "regression", "classification")


def _above(received: Array, bound: Array, rtol: float) -> float:
    """Return the largest relative excess over a bound beyond the tolerance."""
    return float(((received - bound) / bound.max()).max() - rtol)


@check("non-negative")
def non_negative(tested: EstimatorUnderTest) -> None:
    """No variance is negative."""
    for case in fitted_cases(tested, *tested.cases):
        variance = tested.variance(case)
        if variance.min() < 0:
            raise CheckFailure(
                f"variances >= 0 on {case.name}",
                received=f"{variance.min():.4g}, {int((variance < 0).sum())} of {variance.size} negative",
                fault="an indefinite matrix, transposed blocks, or an estimate that is unbiased but not a variance.",
            )


@check("not-constant")
def not_constant(tested: EstimatorUnderTest) -> None:
    """The variance is positive and differs between queries."""
    for case in _cases(tested):
        variance = tested.variance(case)
        spread = float((variance.max(0) - variance.min(0)).min())
        if not spread > _LEAST_SPREAD * float(variance.max()):
            raise CheckFailure(
                f"a variance that differs between the queries of {case.name}",
                received=f"{variance[0, 0]:.4g} at all of them",
                fault="the query is ignored, or the mean over queries is returned.",
            )


@check("below-prior")
def below_prior(tested: EstimatorUnderTest) -> None:
    """The variance is at most that of the prior, J δ⁻¹ Jᵀ."""
    for case in _cases(tested):
        prior = formulas.prior_variance(case, tested.prior_of)
        received = tested.variance(case)
        over = float((received / prior).max())
        if over > 1 + tested.rtol():
            raise CheckFailure(
                f"at most the variance of the prior at every query of {case.name}",
                received=f"{over:.4g} times it",
                fault="the prior is missing or has too small a weight, or observation noise is added.",
            )


@check("prior-limit")
def prior_limit(tested: EstimatorUnderTest) -> None:
    """For δ → ∞ the variance is J Jᵀ/δ, without noise and with the prior counted once."""
    for case in _cases(tested):
        large = replace(case, name=f"{case.name}, large δ", delta=_LARGE_DELTA)
        expected = formulas.prior_variance(large, tested.prior_of) * _LARGE_DELTA
        tested.compare(
            f"δ·variance → J Jᵀ for δ = {_LARGE_DELTA:.0e} on {case.name}",
            as_array(tested.fit(large).variance(case.queries)) * _LARGE_DELTA,
            expected,
            fault="observation noise in the epistemic variance, a standard deviation, or a factor of δ.",
            rtol=1e-3 + tested.rtol(),
        )


@check("prior-monotone")
def prior_monotone(tested: EstimatorUnderTest) -> None:
    """A larger prior precision gives a smaller variance."""
    _ = tested.prior_of
    for case in _cases(tested):
        assert isinstance(case.delta, float)
        doubled = replace(case, name=f"{case.name}, twice δ", delta=2 * case.delta)
        before, after = tested.variance(case), as_array(tested.fit(doubled).variance(case.queries))
        if _above(after, before, tested.rtol()) > 0 or not after.mean() < 0.99 * before.mean():
            raise CheckFailure(
                f"a smaller variance of {case.name} at twice the prior precision",
                received=f"{float(after.mean() / before.mean()):.4g} times it on average",
                fault="the prior is missing, or its precision is used as a variance.",
            )


@check("data-reduce-variance")
def data_reduce_variance(tested: EstimatorUnderTest) -> None:
    """With every training row twice, the variance is 1/2 to 1 times the old one: losses are sums, not means."""
    _ = tested.prior_of
    for case in _cases(tested):
        doubled = replace(case.rows([*range(len(case.x))] * 2), name=f"{case.name} twice")
        before, after = tested.variance(case), as_array(tested.fit(doubled).variance(case.queries))
        rtol = tested.rtol()
        if _above(after, before, rtol) > 0 or _above(before / 2, after, rtol) > 0:
            raise CheckFailure(
                f"between 1/2 and 1 times the variance of {case.name} with every training row twice",
                received=f"{float((after / before).min()):.4g} to {float((after / before).max()):.4g} times it",
                fault="rows counted wrongly, or sampled with the wrong weight.",
            )
        if not after.mean() < (0.98 if not tested.capabilities.noise else 1) * before.mean():
            raise CheckFailure(
                f"a smaller variance of {case.name} with every training row twice",
                received=f"{float(after.mean() / before.mean()):.4g} times it on average",
                fault="a mean over rows instead of a sum in L, so that N has no effect.",
            )


@check("noise-scaling")
def noise_scaling(tested: EstimatorUnderTest) -> None:
    """σ → sσ with δ → δ/s² multiplies A by 1/s², and so the variance by s²."""
    _ = tested.prior_of
    case = tested.cases["regression"]
    assert isinstance(case.sigma, float)
    assert isinstance(case.delta, float)
    scale = 3.0
    scaled = replace(case, name="regression, scaled", sigma=scale * case.sigma, delta=case.delta / scale**2)
    received = as_array(tested.fit(scaled).variance(case.queries))
    fault = "a standard deviation instead of a variance, σ instead of σ², or an unused σ."
    tested.compare("s² times the variance", received, scale**2 * tested.variance(case), fault=fault)


@check("constant-output")
def constant_output(tested: EstimatorUnderTest) -> None:
    """Only an output that does not depend on any weight has variance 0."""
    case = tested.cases["classification"]
    estimator = tested.fit(case, FirstAndThird(tested.model(case)).to(case.device).eval(), may_be_rejected=True)
    variance = as_array(estimator.variance(case.queries))
    constant, others = np.abs(variance[:, 1]).max(), variance[:, [0, 2]].min()
    if constant > 1e-9 * variance.max() or (tested.capabilities.prior_of is not None and not others > 0):
        raise CheckFailure(
            "variance 0 of the second output, which is constant, and positive ones of the others",
            received=f"{variance[0, 0]:.4g}, {variance[0, 1]:.4g}, {variance[0, 2]:.4g} at the first query",
            fault="outputs in another order, or a constant added to each of them.",
        )
