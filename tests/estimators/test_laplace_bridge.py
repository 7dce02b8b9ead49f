"""The Laplace bridge against its formulas written out, and against what defines it."""

import math

import pytest
import torch

from estimators import LinearizedLaplace
from estimators.baselines import MAP
from estimators.errors import UnsupportedError
from estimators.likelihoods.prediction import from_covariance
from estimators.tuning import calibrate

DELTA = 2.5


def by_hand(mu, sigma, *, norm):
    """α row by row, with the projection Σ − Σ11ᵀΣ / 1ᵀΣ1 as matrices."""
    found = []
    for m, s in zip(mu, sigma, strict=True):
        c, ones = len(m), torch.ones(len(m), dtype=m.dtype)
        total = ones @ s @ ones
        m, s = m - s @ ones * (ones @ m) / total, s - torch.outer(s @ ones, s @ ones) / total
        v = s.diag()
        if norm:
            size = v.mean() / math.sqrt(c / 2)
            m, v = m / size.sqrt(), v / size
        found.append((1 - 2 / c + m.exp() / c**2 * (-m).exp().sum()) / v)
    return torch.stack(found)


@pytest.mark.parametrize("name", ["bridge", "bridge_norm"])
def test_it_is_the_dirichlet_of_the_formulas(make_problem, name):
    problem = make_problem()
    fitted = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=DELTA).fit(problem.loader)
    found = fitted.predict(problem.query, link_approx=name)
    mean, covariance = fitted.predict(problem.query).mean, fitted.covariance(problem.query)
    alpha = by_hand(mean, covariance, norm=name == "bridge_norm")
    torch.testing.assert_close(found.concentration, alpha, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.probs, alpha / alpha.sum(-1, keepdim=True), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.epistemic_variance, fitted.variance(problem.query))
    calibrated = found.calibrated(variance_scale=0.3, softmax_temperature=1.7)
    again = from_covariance(mean / 1.7, covariance * 0.3 / 1.7**2, link_approx=name)
    torch.testing.assert_close(calibrated.probs, again.probs)


def test_the_gaussian_of_a_dirichlet_is_mapped_back():
    """The mode and curvature of a Dirichlet in softmax coordinates (Hobbhahn et al. 2022, equations 4 and 5)."""
    alpha = torch.tensor([[2.0, 5.0, 0.7, 3.1], [1.0, 1.0, 4.0, 9.0]], dtype=torch.float64)
    c, logs, inverse = 4, alpha.log(), 1 / alpha
    mean = logs - logs.mean(-1, keepdim=True)
    covariance = (
        torch.diag_embed(inverse) - (inverse[:, :, None] + inverse[:, None, :] - inverse.mean(-1)[:, None, None]) / c
    )
    spread = torch.full((c, c), 0.5, dtype=torch.float64)  # variance along 1 changes no probability
    found = from_covariance(mean, covariance + spread, link_approx="bridge")
    torch.testing.assert_close(found.concentration, alpha, rtol=1e-9, atol=0)


def test_what_has_no_covariance_between_classes_is_rejected(make_problem):
    problem = make_problem()
    with pytest.raises(UnsupportedError, match="probit"):
        MAP(problem.model, problem.likelihood).fit(problem.loader).predict(problem.query, link_approx="bridge")
    problem = make_problem("regression")
    with pytest.raises(UnsupportedError, match="classification"):
        MAP(problem.model, problem.likelihood).fit(problem.loader).predict(problem.query, link_approx="bridge")


@pytest.mark.parametrize("name", ["bridge", "bridge_norm"])
def test_without_variance_it_is_the_softmax_of_the_mean(make_problem, name):
    """A calibration often chooses a variance scale of 0, in which the formulas are 0 / 0."""
    problem = make_problem()
    fitted = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=DELTA).fit(problem.loader)
    made = fitted.predict(problem.query, link_approx=name)
    found = made.calibrated(variance_scale=0.0, softmax_temperature=1.7)
    torch.testing.assert_close(found.probs, (made.mean / 1.7).softmax(-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.log_probs, (made.mean / 1.7).log_softmax(-1), rtol=1e-12, atol=0)
    assert found.link_approx == name
    assert not found.epistemic_variance.any()
    assert not found.covariance.any()
    assert bool(found.concentration.isposinf().all())
    again = found.calibrated(variance_scale=2.0, softmax_temperature=1 / 1.7)
    torch.testing.assert_close(again.probs, made.mean.softmax(-1), rtol=1e-12, atol=0)


def test_a_calibration_may_choose_no_variance(make_problem):
    """The labels are the classes of the network itself: the network without variance has the smallest score."""
    problem = make_problem()
    with torch.no_grad():
        confident = problem.model(problem.query).argmax(-1)
    fitted = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=DELTA)
    fitted.fit(problem.loader, val_loader=[(problem.query, confident)])
    assert fitted.calibration_.calibration.variance_scale == 0
    probit = fitted.predict(problem.query).probs
    for name in ("bridge", "bridge_norm"):
        torch.testing.assert_close(fitted.predict(problem.query, link_approx=name).probs, probit, rtol=1e-12, atol=0)
    made = fitted.predict_uncalibrated(problem.query, link_approx="bridge")
    labels = torch.cat([confident[:1] - 1, confident[1:]]).remainder(3)
    found = calibrate(made, labels)
    assert bool(found.scores.isfinite().all())
    assert found.score <= found.uncalibrated_score


def test_the_error_without_variance_names_a_number(make_problem):
    problem = make_problem()
    with pytest.raises(UnsupportedError, match="smallest variance of 0"):
        MAP(problem.model, problem.likelihood).fit(problem.loader).predict(problem.query, link_approx="bridge")
