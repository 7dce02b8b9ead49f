"""Exact linearized Laplace and its prior: the marginal likelihood, groups of parameters, limits of the precision."""

import math

import pytest
import torch

from estimators import Gaussian, LinearizedLaplace
from estimators.errors import IndefiniteHessianError, OptionError, UnsupportedError

kinds = pytest.mark.parametrize("kind", ["regression", "classification", "binary"])
inverses = pytest.mark.parametrize("inverse", ["cholesky", "dual", "cg"])
SUBSETS = {"all": ["0.weight", "0.bias", "2.weight", "2.bias"], "0.*": ["0.weight", "0.bias"]}


def fit(problem, **options):
    options = {"prior_precision": problem.delta, **options}
    return LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)


def close(found, exact, tol=1e-8):
    return float((found - exact).abs().max() / exact.abs().max()) < tol


def evidence(problem, reference, curvature, delta, mean=0.0):
    """log ∫ exp(−quadratic expansion) dθ: log-likelihood + log prior at θ̂ + ½ log |2π A⁻¹|."""
    precision = reference.precision(curvature, delta)
    with torch.no_grad():
        f = problem.model(problem.x)
    log_likelihood = -reference.minus_log_p(f, problem.y)
    if problem.kind == "regression":
        log_likelihood = log_likelihood - f.numel() * math.log(0.6 * math.sqrt(2 * math.pi))
    vector = torch.as_tensor(delta, dtype=torch.float64).expand(len(reference.theta))
    prior = torch.distributions.Normal(mean, vector.rsqrt()).log_prob(reference.theta).sum()
    volume = 0.5 * (len(precision) * math.log(2 * math.pi) - torch.logdet(precision))
    return log_likelihood + prior + volume


@kinds
def test_the_gradient_of_the_loss_is_that_of_plain_autograd_with_a_prior_mean(kind, make_problem):
    problem = make_problem(kind)
    fitted = fit(problem, prior_mean=0.3)
    objective, theta = fitted.objective_, fitted.theta_
    parameters = list(problem.model.parameters())
    penalty = sum(0.5 * problem.delta * (p - 0.3).square().sum() for p in parameters)
    expected = torch.autograd.grad(
        problem.likelihood.nll(problem.model(problem.x), problem.y).sum() + penalty, parameters
    )
    expected = torch.cat([g.flatten() for g in expected])
    for at in (theta, theta.clone()):  # the trained weights have a shorter way
        assert close(objective.gradient(at), expected, 1e-12)


@kinds
@pytest.mark.parametrize("inverse", ["cholesky", "dual"])
@pytest.mark.parametrize("subset", ["all", "0.*"])
def test_the_marginal_likelihood_is_the_dense_formula_also_for_another_prior(
    kind, inverse, subset, make_problem, by_hand
):
    problem = make_problem(kind)
    reference = by_hand(problem, SUBSETS[subset])
    fitted = fit(problem, inverse=inverse, subset_of_weights=subset)
    found = fitted.log_marginal_likelihood()
    assert torch.allclose(found, evidence(problem, reference, "ggn", problem.delta), rtol=1e-10)
    for delta in (0.3, 7.0):
        expected = evidence(problem, reference, "ggn", delta)
        assert torch.allclose(fitted.log_marginal_likelihood(delta), expected, rtol=1e-10)
    assert torch.equal(fitted.log_marginal_likelihood(), found)


@kinds
def test_the_marginal_likelihood_with_the_exact_hessian_is_the_dense_formula(kind, make_problem, by_hand):
    problem = make_problem(kind, delta=150.0)
    fitted = fit(problem, curvature="hessian", inverse="cholesky")
    for delta in (150.0, 300.0):
        expected = evidence(problem, by_hand(problem), "hessian", delta)
        assert torch.allclose(fitted.log_marginal_likelihood(delta), expected, rtol=1e-10)
    with pytest.raises(IndefiniteHessianError):
        fitted.log_marginal_likelihood(1e-6)


def test_the_marginal_likelihood_for_a_mapping_of_priors(make_problem, by_hand):
    problem = make_problem()
    delta = torch.tensor([3.0] * 25 + [0.4] * 18, dtype=torch.float64)
    found = fit(problem).log_marginal_likelihood({"0.*": 3.0, "*": 0.4})
    assert torch.allclose(found, evidence(problem, by_hand(problem), "ggn", delta), rtol=1e-10)


def test_the_prior_mean_enters_the_marginal_likelihood_and_not_the_variance(make_problem, by_hand):
    problem = make_problem()
    shifted = fit(problem, prior_mean=0.3)
    expected = evidence(problem, by_hand(problem), "ggn", problem.delta, mean=0.3)
    assert torch.allclose(shifted.log_marginal_likelihood(), expected, rtol=1e-10)
    assert torch.equal(shifted.variance(problem.query), fit(problem).variance(problem.query))


def test_there_is_no_determinant_by_products(make_problem):
    with pytest.raises(UnsupportedError, match='inverse="cg"'):
        fit(make_problem(), inverse="cg").log_marginal_likelihood()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_the_marginal_likelihood_rejects_a_precision_that_is_none(bad, make_problem):
    with pytest.raises(OptionError, match="prior_precision > 0"):
        fit(make_problem()).log_marginal_likelihood(bad)


@inverses
def test_a_mapping_gives_each_group_its_own_precision(inverse, make_problem, by_hand):
    problem = make_problem()
    fitted = fit(problem, inverse=inverse, prior_precision={"*.bias": 0.7, "*": 2.0})
    delta = torch.tensor([2.0] * 20 + [0.7] * 5 + [2.0] * 15 + [0.7] * 3)
    exact = by_hand(problem).covariance(problem.query, delta=delta)
    assert close(fitted.covariance(problem.query), exact)


@pytest.mark.parametrize("inverse", ["cholesky", "cg", "auto"])
def test_biases_without_a_prior_are_allowed_where_the_data_determine_them(inverse, make_problem, by_hand):
    problem = make_problem("regression")
    fitted = fit(problem, inverse=inverse, prior_precision={"*.bias": 0.0, "*": 2.0})
    delta = torch.cat([torch.full((20,), 2.0), torch.zeros(5), torch.full((10,), 2.0), torch.zeros(2)])
    assert close(fitted.covariance(problem.query), by_hand(problem).covariance(problem.query, delta=delta))


def test_an_improper_prior_has_no_evidence(make_problem):
    fitted = fit(make_problem("regression"), prior_precision={"*.bias": 0.0, "*": 2.0})
    with pytest.raises(UnsupportedError, match="proper prior"):
        fitted.log_marginal_likelihood()


def test_the_dual_form_rejects_parameters_without_a_prior(make_problem):
    with pytest.raises(OptionError, match=r"positive prior_precision.*cholesky"):
        fit(make_problem(), inverse="dual", prior_precision={"*.bias": 0.0, "*": 2.0})


def test_parameters_that_neither_prior_nor_data_determine_are_rejected(make_problem):
    """Constant logits: the last biases of a softmax have no curvature along (1, 1, 1)."""
    for inverse in ("cholesky", "cg"):
        problem = make_problem("classification")
        with pytest.raises(IndefiniteHessianError, match="a singular one"):
            fit(problem, inverse=inverse, prior_precision={"2.bias": 0.0, "*": 2.0})


@pytest.mark.parametrize("inverse", ["cholesky", "dual"])
def test_another_prior_costs_no_jacobian(inverse, make_problem, monkeypatch):
    fitted = fit(make_problem(), inverse=inverse)
    monkeypatch.setattr("estimators.models.network.Network.jacobian", None)
    assert bool(torch.isfinite(fitted.log_marginal_likelihood(0.7)))


def test_scaling_data_precision_and_prior_together_scales_the_variance(make_problem):
    """With σ² and 1/δ both times s, A is divided by s and every variance multiplied."""
    problem = make_problem("regression")
    base = fit(problem).variance(problem.query)
    problem.likelihood = Gaussian(0.6 * math.sqrt(3.0))
    assert torch.allclose(fit(problem, prior_precision=problem.delta / 3).variance(problem.query), 3 * base, rtol=1e-10)


def test_more_data_and_a_stronger_prior_never_raise_the_variance(make_problem):
    problem = make_problem()
    base = fit(problem).variance(problem.query)
    assert bool((fit(problem, prior_precision=4.0).variance(problem.query) <= base).all())
    problem.x, problem.y = problem.x[:13], problem.y[:13]
    assert bool((fit(problem).variance(problem.query) >= base).all())


def test_without_information_the_variance_is_that_of_the_prior(make_problem, by_hand):
    problem = make_problem(n=1)
    problem.x = torch.full_like(problem.x, 1e-9)
    fitted = fit(problem, subset_of_weights="0.weight", inverse="cholesky")
    jacobian = by_hand(problem, ["0.weight"]).jacobian(problem.query)
    assert torch.allclose(fitted.variance(problem.query), jacobian.square().sum(-1) / problem.delta, rtol=1e-12)
