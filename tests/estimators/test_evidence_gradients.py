"""log p(D) as a function of δ and σ: against new fits, finite differences, and dense formulas."""

import doctest
import math

import pytest
import torch

from estimators import Gaussian, LastLayerLaplace, LinearizedLaplace
from estimators.baselines import MAP
from estimators.errors import ConvergenceError, NotConvergedWarning, OptionError, UnsupportedError
from estimators.laplace import SubnetworkLaplace, evidence_mixin, maximize_marginal_likelihood

DELTA, SIGMA = 2.5, 0.6
MISSING = -999.0


class Scaled(Gaussian):
    """A likelihood of a user, derived from the Gaussian."""


class Masked(Gaussian):
    """A Gaussian that skips missing targets."""

    def nll(self, f, y):
        known = y != MISSING
        residuals = torch.where(known, f - y, 0.0) / self.sigma_noise
        constant = math.log(self.sigma_noise) + 0.5 * math.log(2 * math.pi)
        return (0.5 * residuals.square() + known * constant).sum(-1)


METHODS = {
    "cholesky": lambda model, **options: LinearizedLaplace(model, Gaussian(SIGMA), inverse="cholesky", **options),
    "dual": lambda model, **options: LinearizedLaplace(model, Gaussian(SIGMA), inverse="dual", **options),
    "kron": lambda model, **options: LinearizedLaplace(model, Gaussian(SIGMA), hessian_structure="kron", **options),
    "diag": lambda model, **options: LinearizedLaplace(model, Gaussian(SIGMA), hessian_structure="diag", **options),
    "subnetwork": lambda model, **options: SubnetworkLaplace(
        model, Gaussian(SIGMA), subnetwork_indices=[0, 3, 20, 29], **options
    ),
    "last-full": lambda model, **options: LastLayerLaplace(model, Gaussian(SIGMA), **options),
    "last-kron": lambda model, **options: LastLayerLaplace(model, Gaussian(SIGMA), hessian_structure="kron", **options),
    "last-diag": lambda model, **options: LastLayerLaplace(model, Gaussian(SIGMA), hessian_structure="diag", **options),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_it_is_that_of_a_new_fit_and_its_gradient(make_problem, name):
    problem = make_problem("regression")
    fitted = METHODS[name](problem.model, prior_precision=DELTA).fit(problem.loader)
    delta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    found = fitted.log_marginal_likelihood(delta, sigma)
    other = fitted.clone_with(prior_precision=0.7, likelihood=Gaussian(1.3))
    other._fit(other.objective_, progress_bar=False)
    torch.testing.assert_close(found.detach(), other.log_marginal_likelihood(), rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(fitted.log_marginal_likelihood, (delta, sigma))


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_the_evidence_of_a_subnetwork_is_the_dense_formula(make_problem, by_hand, kind):
    problem, index = make_problem(kind), torch.tensor([0, 3, 20, 29])
    options = {"prior_precision": DELTA, "prior_mean": 0.3}
    fitted = SubnetworkLaplace(problem.model, problem.likelihood, subnetwork_indices=index, **options)
    fitted.fit(problem.loader)
    ggn = by_hand(problem).data_ggn()[index][:, index]
    theta = fitted.theta_[index]
    for delta in (DELTA, 0.4):
        log_lik = -problem.likelihood.nll(problem.model(problem.x).detach(), problem.y).sum()
        log_det = torch.logdet(ggn + delta * torch.eye(4, dtype=torch.float64))
        prior = 4 * math.log(delta) - delta * (theta - 0.3).square().sum()
        torch.testing.assert_close(fitted.log_marginal_likelihood(delta), log_lik + 0.5 * (prior - log_det))
    whole = SubnetworkLaplace(problem.model, problem.likelihood, n_parameters=999, **options).fit(problem.loader)
    exact = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
    torch.testing.assert_close(whole.log_marginal_likelihood(), exact.log_marginal_likelihood(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize(
    "options",
    [{"inverse": "cholesky"}, {"inverse": "dual"}, *({"hessian_structure": s} for s in ("diag", "kron", "ekfac"))],
)
def test_another_sigma_is_that_of_a_new_fit_for_other_fishers(make_problem, options, fisher):
    problem = make_problem("regression")
    fits = [
        LinearizedLaplace(problem.model, Gaussian(sigma), prior_precision=DELTA, fisher=fisher, **options).fit(
            problem.loader
        )
        for sigma in (0.7, 1.4)
    ]
    found = fits[0].log_marginal_likelihood(sigma_noise=1.4)
    torch.testing.assert_close(found, fits[1].log_marginal_likelihood(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("sigma", [-1, 0.0, math.inf, math.nan, [0.5, 0.7], torch.tensor([0.5, 0.7]), True, "1"])
@pytest.mark.parametrize("name", ["cholesky", "last-diag"])
def test_a_bad_sigma_is_rejected(make_problem, name, sigma):
    problem = make_problem("regression")
    fitted = METHODS[name](problem.model, prior_precision=DELTA).fit(problem.loader)
    for evidence in (fitted.log_marginal_likelihood, fitted.evidence_function()):
        with pytest.raises(OptionError, match="sigma_noise"):
            evidence(0.7, sigma)


@pytest.mark.parametrize("kind", [LinearizedLaplace, LastLayerLaplace, SubnetworkLaplace])
def test_another_sigma_of_a_likelihood_with_its_own_nll_is_rejected(make_problem, kind):
    problem = make_problem("regression")
    y = problem.y.clone()
    y[::2, 0] = MISSING
    fitted = kind(problem.model, Masked(SIGMA), prior_precision=DELTA).fit([(problem.x, y)])
    same = fitted.log_marginal_likelihood(sigma_noise=SIGMA)
    torch.testing.assert_close(same, fitted.log_marginal_likelihood())
    sigma = torch.tensor(SIGMA, dtype=torch.float64, requires_grad=True)
    evaluations = [
        lambda: fitted.log_marginal_likelihood(sigma_noise=1.2),
        lambda: fitted.evidence_function()(2.0, sigma),
        lambda: maximize_marginal_likelihood(fitted),
    ]
    for evaluate in evaluations[: 2 if kind is SubnetworkLaplace else 3]:
        with pytest.raises(UnsupportedError, match="Masked, which overrides nll"):
            evaluate()


def test_each_value_of_a_mapping_has_a_gradient(make_problem):
    problem = make_problem("classification")
    fitted = LinearizedLaplace(problem.model, problem.likelihood, inverse="dual").fit(problem.loader)
    deltas = torch.tensor([0.7, 3.0], dtype=torch.float64, requires_grad=True)

    def evidence(deltas):
        return fitted.log_marginal_likelihood({"0.*": deltas[0], "*": deltas[1]})

    expected = fitted.log_marginal_likelihood({"0.*": 0.7, "*": 3.0})
    torch.testing.assert_close(evidence(deltas).detach(), expected, rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(evidence, (deltas,))
    with pytest.raises(OptionError, match="one σ"):
        fitted.log_marginal_likelihood(sigma_noise=1.0)


@pytest.mark.parametrize("name", ["cholesky", "dual", "diag", "subnetwork", "last-full", "last-diag"])
def test_each_entry_of_a_vector_or_of_tensors_in_a_mapping_has_a_gradient(make_problem, name):
    problem = make_problem("regression")
    fitted = METHODS[name](problem.model, prior_precision=DELTA).fit(problem.loader)
    delta = (0.5 + torch.rand(len(fitted.theta_), dtype=torch.float64)).requires_grad_()
    expected = fitted.log_marginal_likelihood(delta.detach())
    torch.testing.assert_close(fitted.log_marginal_likelihood(delta).detach(), expected, rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(fitted.log_marginal_likelihood, (delta,))

    def named(bias, other):
        return fitted.log_marginal_likelihood({"2.bias": bias, "*": other}, 0.9)

    bias, other = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.6, 1.7], 1.2))
    expected = fitted.log_marginal_likelihood({"2.bias": bias.detach(), "*": 1.2}, 0.9)
    torch.testing.assert_close(named(bias, other).detach(), expected, rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(named, (bias, other))


@pytest.mark.parametrize("entries", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("graph", [False, True])
def test_a_bad_vector_of_prior_precisions_is_rejected(make_problem, entries, graph):
    problem = make_problem("regression")
    fitted = METHODS["cholesky"](problem.model, prior_precision=DELTA).fit(problem.loader)
    good = torch.ones(len(fitted.theta_), dtype=torch.float64)
    bad = torch.where(torch.arange(len(good)) == 3, entries, good).requires_grad_(graph)
    for evidence in (fitted.log_marginal_likelihood, fitted.evidence_function()):
        for delta in (bad, good[1:].requires_grad_(graph), {"2.bias": good[:5].requires_grad_(graph), "*": 1.0}):
            with pytest.raises(OptionError, match="prior_precision"):
                evidence(delta, 1.3)


@pytest.mark.parametrize("name", ["cholesky", "kron", "last-full"])
@pytest.mark.parametrize("given", [DELTA, {"0.*": 1.0, "*": 4.0}])
def test_at_the_maximum_both_gradients_vanish(make_problem, name, given):
    problem = make_problem("regression")
    if name == "last-full" and isinstance(given, dict):
        given = {"*": 4.0}
    fitted = METHODS[name](problem.model, prior_precision=given).fit(problem.loader)
    found = maximize_marginal_likelihood(fitted)
    best = found.estimator.log_marginal_likelihood()
    torch.testing.assert_close(float(best), found.log_marginal_likelihood, rtol=1e-9, atol=0)
    assert found.trace[0] < float(best)
    assert found.estimator.likelihood.sigma_noise == found.sigma_noise
    assert found.estimator.prior_precision == found.prior_precision
    names = list(given) if isinstance(given, dict) else ["*"]
    values = list(found.prior_precision.values()) if isinstance(given, dict) else [found.prior_precision]
    logs = torch.tensor([*values, found.sigma_noise], dtype=torch.float64).log().requires_grad_()
    deltas = dict(zip(names, logs.exp(), strict=False))
    (slope,) = torch.autograd.grad(fitted.log_marginal_likelihood(deltas, logs.exp()[-1]), logs)
    assert float(slope.abs().max()) < 1e-3


@pytest.mark.parametrize("name", ["cholesky", "last-full"])
def test_the_found_likelihood_keeps_the_units_of_the_targets(make_problem, name):
    problem = make_problem("regression")
    units = {"target_shift": [100.0, 200.0], "target_scale": [10.0, 20.0]}
    kind = type(METHODS[name](problem.model))
    fitted = kind(problem.model, Scaled(0.7, **units), prior_precision=DELTA).fit(problem.loader)
    found = maximize_marginal_likelihood(fitted)
    assert isinstance(found.estimator.likelihood, Scaled)
    prediction = found.estimator.predict(problem.query)
    shift, scale = (torch.tensor(values, dtype=torch.float64) for values in units.values())
    expected = found.sigma_noise**2 * scale.square() + scale.square() * found.estimator.variance(problem.query)
    torch.testing.assert_close(prediction.mean, shift + scale * problem.model(problem.query).detach())
    torch.testing.assert_close(prediction.total_variance, expected)


@pytest.mark.parametrize("name", ["cholesky", "last-full"])
def test_sigmas_of_outputs_are_searched_by_a_common_factor(make_problem, name):
    problem = make_problem("regression")
    kind = type(METHODS[name](problem.model))
    fitted = kind(problem.model, Gaussian([0.5, 0.7]), prior_precision=DELTA).fit(problem.loader)
    found = maximize_marginal_likelihood(fitted)
    factors = found.sigma_noise / torch.tensor([0.5, 0.7], dtype=torch.float64)
    assert float(factors[0]) == pytest.approx(float(factors[1]))
    assert float(factors[0]) != pytest.approx(1.0, rel=0.01)
    best = found.estimator.log_marginal_likelihood()
    torch.testing.assert_close(float(best), found.log_marginal_likelihood, rtol=1e-9, atol=0)
    for factor in (0.98, 1.02):
        other = fitted.clone_with(
            prior_precision=found.prior_precision, likelihood=Gaussian(found.sigma_noise * factor)
        )
        assert float(other.log_marginal_likelihood()) < float(best)


@pytest.mark.parametrize("form", ["vector", "mapping", "zero"])
def test_a_search_over_tensors_is_rejected(make_problem, form):
    problem = make_problem("regression")
    n = sum(p.numel() for p in problem.model.parameters())
    delta = {"vector": torch.ones(n).double(), "mapping": {"2.bias": torch.ones(2).double(), "*": 1.0}}
    delta = delta.get(form, {"2.bias": 0.0, "*": 1.0})
    fitted = METHODS["cholesky"](problem.model, prior_precision=delta).fit(problem.loader)
    with pytest.raises(OptionError, match="numbers"):
        maximize_marginal_likelihood(fitted)


def test_the_search_starts_from_the_chosen_prior_precision(make_problem):
    problem = make_problem("regression")
    far = 3 * torch.randn(40, 4, dtype=torch.float64)  # targets that need another prior precision
    fitted = METHODS["cholesky"](problem.model, prior_precision=DELTA).fit(problem.loader[:2])
    y = fitted.clone_with(prior_precision=0.25).sample(far, 1)[0]
    fitted.fit(problem.loader, val_loader=[(far, y + 0.6 * torch.randn_like(y))])
    assert fitted.prior_precision_ != DELTA
    found = maximize_marginal_likelihood(fitted)
    assert found.trace[0] == pytest.approx(float(fitted.log_marginal_likelihood()), rel=1e-9)


def test_the_evidence_of_a_subnetwork_is_over_the_weights_of_the_fit(make_problem):
    problem = make_problem("regression")
    other = {"0.*": 5.0, "*": 0.2}
    options = {"n_parameters": 9, "prior_precision": {"0.*": 1.0, "*": 1.0}}
    fitted = SubnetworkLaplace(problem.model, Gaussian(SIGMA), **options).fit(problem.loader)
    options = {"subnetwork_indices": fitted.index_, "prior_precision": other}
    same = SubnetworkLaplace(problem.model, Gaussian(SIGMA), **options).fit(problem.loader)
    torch.testing.assert_close(fitted.log_marginal_likelihood(other), same.log_marginal_likelihood())
    assert not torch.equal(fitted.clone_with(prior_precision=other).index_, fitted.index_)


def test_a_low_rank_evidence_at_other_ratios_is_rejected(make_problem):
    problem = make_problem("regression")
    given = {"0.*": 0.7, "*": 1.9}
    options = {"hessian_structure": "lowrank", "rank": 6, "prior_precision": given}
    fitted = LinearizedLaplace(problem.model, Gaussian(SIGMA), **options).fit(problem.loader)
    tenth = {name: 0.1 * value for name, value in given.items()}
    expected = fitted.clone_with(prior_precision=tenth).log_marginal_likelihood()
    torch.testing.assert_close(fitted.log_marginal_likelihood(tenth), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(fitted.evidence_function()(tenth, None), expected, rtol=1e-10, atol=0)
    other = {"0.*": 0.1, "*": 30.0}
    evaluations = [
        lambda: fitted.log_marginal_likelihood(other),
        lambda: fitted.log_marginal_likelihood(other, 0.9),
        lambda: fitted.evidence_function()(other, None),
        lambda: maximize_marginal_likelihood(fitted),
    ]
    for evaluate in evaluations:
        with pytest.raises(OptionError, match="ratios"):
            evaluate()


def test_the_value_is_that_of_the_returned_options(make_problem):
    problem = make_problem("regression")
    fitted = METHODS["cholesky"](problem.model, prior_precision=DELTA).fit(problem.loader)
    for steps in range(1, 5):
        with pytest.warns(NotConvergedWarning, match=f"max_iterations={steps}"):
            found = maximize_marginal_likelihood(fitted, max_iterations=steps)
        best = float(found.estimator.log_marginal_likelihood())
        assert best == pytest.approx(found.log_marginal_likelihood, rel=1e-9) == found.trace[-1]


def test_a_prior_precision_without_a_maximum_is_warned_about(make_problem):
    problem = make_problem("regression")
    with torch.no_grad():
        problem.model[2].bias.zero_()
    fitted = METHODS["cholesky"](problem.model, prior_precision={"2.bias": 1.0, "*": 1.0}).fit(problem.loader)
    with pytest.warns(NotConvergedWarning, match="may have no maximum"):
        found = maximize_marginal_likelihood(fitted)
    assert found.prior_precision["2.bias"] > 1e6


@pytest.mark.parametrize("name", ["cholesky", "dual", "last-full"])
@pytest.mark.parametrize("noise", [0.0, 1e-15])
def test_a_network_that_fits_its_targets_exactly_is_rejected(make_problem, name, noise):
    problem = make_problem("regression")
    y = problem.model(problem.x).detach()
    fitted = METHODS[name](problem.model, prior_precision=DELTA).fit([(problem.x, y + noise * torch.randn_like(y))])
    with pytest.raises(UnsupportedError, match="exactly"):
        maximize_marginal_likelihood(fitted)


def test_a_value_that_is_not_finite_ends_the_search(make_problem):
    problem = make_problem("regression")
    fitted = METHODS["diag"](problem.model, prior_precision=DELTA).fit(problem.loader)
    fitted.data_curvature_.blocks["0.weight"].eigenvalues[0, 0] = math.nan
    with pytest.raises(ConvergenceError, match=r"nan at 2\.5, 1"):
        maximize_marginal_likelihood(fitted)


@pytest.mark.parametrize("kind", [SubnetworkLaplace, MAP])
def test_a_search_with_another_estimator_is_rejected(make_problem, kind):
    problem = make_problem("regression")
    fitted = kind(problem.model, problem.likelihood).fit(problem.loader)
    with pytest.raises(UnsupportedError, match=rf"depend on the prior precision\. Received {kind.__name__}"):
        maximize_marginal_likelihood(fitted)


def test_what_has_no_determinant_is_rejected(make_problem):
    problem = make_problem("regression")
    fitted = LinearizedLaplace(problem.model, problem.likelihood, inverse="cg").fit(problem.loader)
    with pytest.raises(UnsupportedError, match="differentiable"):
        maximize_marginal_likelihood(fitted)


def test_the_examples_of_the_module_run():
    assert doctest.testmod(evidence_mixin).failed == 0
    assert doctest.testmod(evidence_mixin).attempted > 5
