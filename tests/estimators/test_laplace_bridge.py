"""The Laplace bridge against its formulas written out, and against what defines it."""

import math

import pytest
import torch

from estimators import LinearizedLaplace
from estimators.baselines import MAP
from estimators.errors import UnsupportedError
from estimators.likelihoods.prediction import from_covariance

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
