"""Laws that any Gaussian posterior over weights obeys, whatever its structure."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from estimators.testing import formulas
from estimators.testing.case_selection import fitted_cases
from estimators.testing.cases import Case
from estimators.testing.estimator_under_test import EstimatorUnderTest, as_array
from estimators.testing.networks import Array, FirstAndThird
from estimators.testing.outcomes import CheckFailure, NotApplicable
from estimators.testing.registry import check

__all__: list[str] = []

_FLAT, _STIFF = 1e-9, 1e7


def _cases(subject: EstimatorUnderTest) -> list[Case]:
    """One with Λ = I/σ² and one with a full Λ, as far as they are taken; linear ones where A is the exact Hessian.

    Of a network with a hidden layer the data's part of the Hessian may be indefinite, and add variance.
    """
    if subject.claims.exact == "hessian":
        return fitted_cases(subject, "linear regression", "softmax regression")
    return fitted_cases(subject, "regression", "classification")


def _above(received: Array, bound: Array, slack: float) -> float:
    """How far above the bound, relative."""
    return float(((received - bound) / bound.max()).max() - slack)


@check("non-negative")
def non_negative(subject: EstimatorUnderTest) -> None:
    """A variance is not negative."""
    for case in subject.cases.values():
        try:
            variance = subject.variance(case)
        except NotApplicable:
            continue
        if variance.min() < 0:
            raise CheckFailure(
                f"variances >= 0 on {case.name}",
                received=f"{variance.min():.4g}, {int((variance < 0).sum())} of {variance.size} negative",
                fault="an indefinite matrix, transposed blocks, or an estimate that is unbiased but not a variance.",
            )


@check("not-constant")
def not_constant(subject: EstimatorUnderTest) -> None:
    """The variance depends on x, and is positive."""
    for case in _cases(subject):
        variance = subject.variance(case)
        spread = float((variance.max(0) - variance.min(0)).min())
        if not spread > _FLAT * float(variance.max()):
            raise CheckFailure(
                f"a variance that differs between the queries of {case.name}",
                received=f"{variance[0, 0]:.4g} at all of them",
                fault="the query is not looked at, or the mean over queries is returned.",
            )


@check("below-prior")
def below_prior(subject: EstimatorUnderTest) -> None:
    """Data only take variance away: it is below that of the prior, J δ⁻¹ Jᵀ."""
    for case in _cases(subject):
        prior = formulas.prior_variance(case, subject.prior_of)
        received = subject.variance(case)
        over = float((received / prior).max())
        if over > 1 + subject.slack():
            raise CheckFailure(
                f"at most the variance of the prior at every query of {case.name}",
                received=f"{over:.4g} times it",
                fault="the prior is left out or counted less, or observation noise is added.",
            )


@check("prior-limit")
def prior_limit(subject: EstimatorUnderTest) -> None:
    """For δ → ∞ the variance is J Jᵀ/δ: it neither keeps a noise nor counts the prior otherwise."""
    for case in _cases(subject):
        stiff = replace(case, name=f"{case.name}, large δ", delta=_STIFF)
        expected = formulas.prior_variance(stiff, subject.prior_of) * _STIFF
        subject.compare(
            f"δ·variance → J Jᵀ for δ = {_STIFF:.0e} on {case.name}",
            as_array(subject.fit(stiff).variance(case.queries)) * _STIFF,
            expected,
            fault="observation noise in the epistemic variance, a standard deviation in its place, or a factor at δ.",
            slack=1e-3 + subject.slack(),
        )


@check("prior-monotone")
def prior_monotone(subject: EstimatorUnderTest) -> None:
    """A larger prior precision gives a smaller variance."""
    _ = subject.prior_of
    for case in _cases(subject):
        assert isinstance(case.delta, float)
        stiffer = replace(case, name=f"{case.name}, twice δ", delta=2 * case.delta)
        before, after = subject.variance(case), as_array(subject.fit(stiffer).variance(case.queries))
        if _above(after, before, subject.slack()) > 0 or not after.mean() < 0.99 * before.mean():
            raise CheckFailure(
                f"a smaller variance of {case.name} at twice the prior precision",
                received=f"{float(after.mean() / before.mean()):.4g} times it on average",
                fault="the prior is left out, or its precision used as a variance.",
            )


@check("data-take-variance")
def data_take_variance(subject: EstimatorUnderTest) -> None:
    """With every row twice the variance is between half and all of what it was: losses are sums, never means."""
    _ = subject.prior_of
    for case in _cases(subject):
        doubled = replace(case.rows([*range(len(case.x))] * 2), name=f"{case.name} twice")
        before, after = subject.variance(case), as_array(subject.fit(doubled).variance(case.queries))
        slack = subject.slack()
        if _above(after, before, slack) > 0 or _above(before / 2, after, slack) > 0:
            raise CheckFailure(
                f"between 1/2 and 1 times the variance of {case.name} where every row is there twice",
                received=f"{float((after / before).min()):.4g} to {float((after / before).max()):.4g} times it",
                fault="rows counted wrongly, or sampled with the wrong weight.",
            )
        if not after.mean() < (0.98 if not subject.claims.noise else 1) * before.mean():
            raise CheckFailure(
                f"a smaller variance of {case.name} where every row is there twice",
                received=f"{float(after.mean() / before.mean()):.4g} times it on average",
                fault="a mean over rows where L is a sum, so that N does not count.",
            )


@check("scaling-law")
def scaling_law(subject: EstimatorUnderTest) -> None:
    """σ → sσ with δ → δ/s² multiplies A by 1/s², and so the variance by s²."""
    _ = subject.prior_of
    case = subject.cases["regression"]
    assert isinstance(case.sigma, float)
    assert isinstance(case.delta, float)
    scale = 3.0
    scaled = replace(case, name="regression, scaled", sigma=scale * case.sigma, delta=case.delta / scale**2)
    received = as_array(subject.fit(scaled).variance(case.queries))
    fault = "a standard deviation in place of a variance, σ in place of σ², or σ not used at all."
    subject.compare("s² times the variance", received, scale**2 * subject.variance(case), fault=fault)


@check("constant-output")
def constant_output(subject: EstimatorUnderTest) -> None:
    """An output that no weight moves has variance 0, and it alone."""
    case = subject.cases["classification"]
    estimator = subject.fit(case, FirstAndThird(subject.model(case)).to(case.device).eval(), special=True)
    variance = as_array(estimator.variance(case.queries))
    still, moving = np.abs(variance[:, 1]).max(), variance[:, [0, 2]].min()
    if still > 1e-9 * variance.max() or (subject.claims.prior_of is not None and not moving > 0):
        raise CheckFailure(
            "variance 0 of the second output, which is constant, and positive ones of the others",
            received=f"{variance[0, 0]:.4g}, {variance[0, 1]:.4g}, {variance[0, 2]:.4g} at the first query",
            fault="outputs in another order, or something added to each of them.",
        )
