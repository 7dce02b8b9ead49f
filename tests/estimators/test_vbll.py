"""VBLL against Bayesian linear regression, the conditions of its optimum, and its bound written out."""

import math

import pytest
import torch
from torch import nn

from estimators import Categorical, Gaussian, LastLayerLaplace
from estimators.errors import NoLastLayerError, NotConvergedWarning, OptionError, UnsupportedError
from estimators.variational import VBLL

PRIOR = {"*bias": 0.9, "*": 3.1}


def features(problem):
    with torch.no_grad():
        return [
            torch.cat([problem.model[:2](x), torch.ones(len(x), 1).double()], 1) for x in (problem.x, problem.query)
        ]


def test_regression_is_bayesian_linear_regression_on_the_features(make_problem):
    problem = make_problem("regression")
    sigma = torch.tensor([0.5, 1.4]).double()
    options = {"prior_precision": PRIOR, "prior_mean": 0.3}
    fitted = VBLL(problem.model, Gaussian(sigma), **options).fit(problem.loader)
    phi, query = features(problem)
    delta = torch.tensor([3.1] * 5 + [0.9], dtype=torch.float64)
    log_evidence = 0.0
    for c in range(2):
        a = phi.T @ phi / sigma[c] ** 2 + delta.diag()
        mean = torch.linalg.solve(a, phi.T @ problem.y[:, c] / sigma[c] ** 2 + 0.3 * delta)
        assert torch.allclose(fitted.posterior_.mean[c], mean, rtol=1e-9)
        assert torch.allclose(fitted.predict_uncalibrated(problem.query).mean[:, c], query @ mean, rtol=1e-9)
        joint = query @ torch.linalg.solve(a, query.T)
        assert torch.allclose(fitted.joint_covariance(problem.query)[:, c, :, c], joint, rtol=1e-9)
        covariance = phi @ (phi / delta).T + sigma[c] ** 2 * torch.eye(20).double()
        prior = torch.distributions.MultivariateNormal(0.3 * phi.sum(1), covariance)
        log_evidence += float(prior.log_prob(problem.y[:, c]))
    assert fitted.bound_ == pytest.approx(log_evidence, rel=1e-9)  # the bound is tight
    laplace = LastLayerLaplace(problem.model, Gaussian(sigma), **options).fit(problem.loader)
    assert torch.allclose(fitted.variance(problem.query), laplace.variance(problem.query), rtol=1e-9)
    assert float(fitted.joint_covariance(problem.query)[:, 0, :, 1].abs().max()) == 0.0


def q_of(fitted):
    return fitted.posterior_.mean, torch.linalg.inv(fitted.posterior_.precision)


def bound_by_hand(kind, phi, y, mean, covariance, delta, theta_0):
    """Theorem 2 row by row; the divergence from torch.distributions."""
    total = 0.0
    for n in range(len(phi)):
        shifted = [float(m @ phi[n] + 0.5 * phi[n] @ s @ phi[n]) for m, s in zip(mean, covariance, strict=True)]
        z = [float(m @ phi[n]) for m in mean]
        if kind == "classification":
            total += z[int(y[n])] - math.log(sum(math.exp(value) for value in shifted))
        else:
            total += sum(float(y[n, c]) * z[c] - math.log1p(math.exp(shifted[c])) for c in range(len(z)))
    normal = torch.distributions.MultivariateNormal
    prior = normal(torch.full_like(delta, theta_0), (1 / delta).diag())
    for m, s in zip(mean, covariance, strict=True):
        total -= float(torch.distributions.kl_divergence(normal(m, s), prior))
    return total


@pytest.mark.parametrize("kind", ["classification", "binary"])
def test_the_bound_is_that_of_the_paper_and_stationary(kind, make_problem):
    problem = make_problem(kind)
    # Round-off of the bound ends a line search at derivatives of about 1e-8, depending on the processor.
    options = {"prior_precision": PRIOR, "prior_mean": 0.3, "tol": 1e-7}
    fitted = VBLL(problem.model, kind, **options).fit(problem.loader)
    phi, _ = features(problem)
    delta = torch.tensor([3.1] * 5 + [0.9], dtype=torch.float64)
    mean, covariance = q_of(fitted)
    by_hand = bound_by_hand(kind, phi, problem.y, mean, covariance, delta, 0.3)
    assert fitted.bound_ == pytest.approx(by_hand, rel=1e-9)
    # At the maximum S_c⁻¹ = δ + Σ p̃ φφᵀ and Σ (y − p̃) φ = δ (m − θ₀)
    shifted = phi @ mean.T + 0.5 * torch.einsum("ne,cef,nf->nc", phi, covariance, phi)
    p = shifted.softmax(1) if kind == "classification" else shifted.sigmoid()
    y = torch.eye(3).double()[problem.y] if kind == "classification" else problem.y
    for c in range(p.shape[1]):
        precision = delta.diag() + phi.T @ (p[:, c, None] * phi)
        assert torch.allclose(fitted.posterior_.precision[c], precision, rtol=1e-5, atol=1e-6)
        slope = (y[:, c] - p[:, c]) @ phi - delta * (mean[c] - 0.3)
        assert float(slope.abs().max()) < 1e-5
    # No other Gaussian near it has a larger bound.
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        step = 0.05 * torch.randn(mean.shape, generator=generator, dtype=torch.float64)
        factor = math.exp(0.1 * (-1) ** seed)
        assert bound_by_hand(kind, phi, problem.y, mean + step, factor * covariance, delta, 0.3) < by_hand


def test_the_bound_is_below_the_expected_log_likelihood(make_problem):
    problem = make_problem("classification")
    fitted = VBLL(problem.model, "classification", prior_precision=0.4).fit(problem.loader)
    mean, covariance = q_of(fitted)
    normal = torch.distributions.MultivariateNormal
    weights = normal(mean, covariance).sample((4000,))  # (S, C, E)
    phi, _ = features(problem)
    log_p = torch.einsum("sce,ne->snc", weights, phi).log_softmax(-1)[:, torch.arange(20), problem.y].sum(1)
    prior = normal(torch.zeros(6).double(), torch.eye(6).double() / 0.4)
    kl = sum(torch.distributions.kl_divergence(normal(m, s), prior) for m, s in zip(mean, covariance, strict=True))
    gap = float(log_p.mean() - kl) - fitted.bound_
    assert 0 < gap < 10
    assert gap > 5 * float(log_p.std()) / math.sqrt(4000)


def test_samples_and_weights_are_those_of_the_posterior(make_problem):
    problem = make_problem("classification")
    fitted = VBLL(problem.model, "classification", prior_precision=2.5).fit(problem.loader)
    weights, functions = fitted.sample_weights(3, seed=4), fitted.sample(problem.query, 3, seed=4)
    for theta, f in zip(weights, functions, strict=True):
        state = fitted.weights_to_state_dict(theta)
        by_network = torch.func.functional_call(problem.model, state, (problem.query,))
        assert torch.allclose(by_network, f, rtol=1e-9)


def test_a_frozen_bias_stays(make_problem):
    problem = make_problem("regression")
    problem.model[2].bias.requires_grad_(False)
    fitted = VBLL(problem.model, Gaussian(0.6), prior_precision=2.5).fit(problem.loader)
    phi, query = (f[:, :5] for f in features(problem))
    bias = problem.model[2].bias.detach()
    a = phi.T @ phi / 0.36 + 2.5 * torch.eye(5).double()
    mean = torch.linalg.solve(a, phi.T @ (problem.y - bias) / 0.36)
    assert torch.allclose(fitted.predict_uncalibrated(problem.query).mean, query @ mean + bias, rtol=1e-9)


def test_soft_targets_are_the_mixture_of_hard_ones(make_problem):
    problem = make_problem("classification")
    soft = torch.eye(3).double()[problem.y]
    loaders = [problem.loader, list(zip(problem.x.split(6), soft.split(6), strict=True))]
    hard, other = (VBLL(problem.model, Categorical()).fit(loader) for loader in loaders)
    assert torch.allclose(hard.posterior_.mean, other.posterior_.mean, rtol=1e-12)


def test_bad_options_and_networks_are_rejected(make_problem):
    problem = make_problem("classification")
    with pytest.raises(OptionError, match="subset_of_weights"):
        VBLL(problem.model, "classification", subset_of_weights="all")
    with pytest.raises(OptionError, match="tol"):
        VBLL(problem.model, "classification", tol=0.0)
    with pytest.raises(OptionError, match="δ = 0"):
        VBLL(problem.model, "classification", prior_precision={"*bias": 0.0, "*": 1.0}).fit(problem.loader)
    with pytest.warns(NotConvergedWarning, match="larger max_iter"):
        VBLL(problem.model, "classification", max_iter=1, tol=1e-9).fit(problem.loader)
    ends = nn.Sequential(*problem.model, nn.Tanh())
    with pytest.raises(NoLastLayerError):
        VBLL(ends, "classification").fit(problem.loader)
    masked = list(zip(problem.x.split(6), torch.where(problem.y == 0, -100, problem.y).split(6), strict=True))
    with pytest.raises(UnsupportedError, match="one class per row"):
        VBLL(problem.model, Categorical()).fit(masked)
