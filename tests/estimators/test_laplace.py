"""Exact linearized Laplace: every route against the dense formula, by every curvature, subset and architecture."""

import math

import pytest
import torch

from estimators import LinearizedLaplace
from estimators.errors import IndefiniteHessianError, OptionError

KINDS = ["regression", "classification", "binary"]
kinds = pytest.mark.parametrize("kind", KINDS)
inverses = pytest.mark.parametrize("inverse", ["cholesky", "dual", "cg"])
SUBSETS = {
    "all": ["0.weight", "0.bias", "2.weight", "2.bias"],
    "last_layer": ["2.weight", "2.bias"],
    "0.*": ["0.weight", "0.bias"],
    ("0.bias", "2.weight"): ["0.bias", "2.weight"],
}


def fit(problem, **options):
    options = {"prior_precision": problem.delta, **options}
    return LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)


def close(found, exact, tol=1e-8):
    return float((found - exact).abs().max() / exact.abs().max()) < tol


def outputs(kind):
    return 3 if kind == "classification" else 2


@kinds
@inverses
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_the_ggn_covariance_is_the_dense_formula(kind, inverse, subset, make_problem, by_hand):
    problem = make_problem(kind)
    fitted = fit(problem, inverse=inverse, subset_of_weights=subset)
    exact = by_hand(problem, SUBSETS[subset]).covariance(problem.query)
    assert close(fitted.covariance(problem.query), exact)
    assert close(fitted.variance(problem.query), exact.diagonal(dim1=1, dim2=2))
    assert fitted.inverse_ == inverse


@kinds
@pytest.mark.parametrize("inverse", ["cholesky", "cg"])
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_the_hessian_covariance_is_the_dense_formula(kind, inverse, subset, make_problem, by_hand):
    problem = make_problem(kind, delta=150.0 if kind == "regression" else 20.0)
    fitted = fit(problem, inverse=inverse, subset_of_weights=subset, curvature="hessian")
    reference = by_hand(problem, SUBSETS[subset])
    assert float(torch.linalg.eigvalsh(reference.precision("hessian"))[0]) > 1
    exact = reference.covariance(problem.query, "hessian")
    assert close(fitted.covariance(problem.query), exact)
    assert close(fitted.variance(problem.query), exact.diagonal(dim1=1, dim2=2))
    if subset not in ("last_layer",):  # where outputs are linear in θ there is no difference
        assert not close(exact, reference.covariance(problem.query, "ggn"), 1e-4)


@kinds
def test_of_a_linear_subset_hessian_and_ggn_are_one(kind, make_problem):
    problem = make_problem(kind)
    by = [fit(problem, subset_of_weights="last_layer", curvature=c).variance(problem.query) for c in ("ggn", "hessian")]
    assert close(*by)


def test_the_reference_hessian_agrees_with_differences_of_the_gradient(make_problem, by_hand):
    reference = by_hand(make_problem("classification"))
    slope = torch.func.grad(lambda t: reference.minus_log_p(reference.f(t, reference.problem.x), reference.problem.y))
    eye = 1e-5 * torch.eye(len(reference.theta), dtype=torch.float64)
    columns = [(slope(reference.theta + e) - slope(reference.theta - e)) / 2e-5 for e in eye]
    assert close(reference.data_hessian(), torch.stack(columns, dim=1), 1e-7)


@inverses
def test_variance_does_not_depend_on_how_the_queries_are_batched(inverse, make_problem):
    problem = make_problem()
    fitted = fit(problem, inverse=inverse)
    whole = fitted.variance(problem.query)
    for size in (1, 2, 5):
        params = torch.cat([fitted.variance(part) for part in problem.query.split(size)])
        assert torch.allclose(params, whole, rtol=1e-8)


@kinds
def test_predictions_have_the_shapes_of_the_outputs(kind, make_problem):
    problem = make_problem(kind)
    prediction = fit(problem).predict(problem.query)
    shape = (7, outputs(kind))
    with torch.no_grad():
        assert torch.allclose(prediction.mean, problem.model(problem.query), rtol=1e-12)
    assert prediction.epistemic_variance.shape == shape
    if kind == "regression":
        assert torch.allclose(prediction.total_variance, prediction.epistemic_variance + 0.36, rtol=1e-12)
    else:
        assert prediction.probs.shape == shape
        assert prediction.entropy.shape == ((7,) if kind == "classification" else shape)


def test_no_result_carries_a_graph(make_problem):
    problem = make_problem()
    fitted = fit(problem)
    prediction = fitted.predict(problem.query)
    results = [fitted.variance(problem.query), fitted.covariance(problem.query), fitted.sample(problem.query, 2)]
    assert not any(result.requires_grad for result in [*results, prediction.mean, prediction.probs, fitted.theta_])


@kinds
def test_the_variance_of_a_functional_is_the_delta_method(kind, make_problem):
    problem = make_problem(kind)
    fitted = fit(problem)
    covariance = fitted.covariance(problem.query)
    margin = torch.zeros(outputs(kind), dtype=torch.float64)
    margin[0], margin[1] = 1.0, -1.0
    by_hand = torch.einsum("c,mcd,d->m", margin, covariance, margin)[:, None]
    assert torch.allclose(fitted.variance(problem.query, of=lambda f: f[0] - f[1]), by_hand, rtol=1e-10)
    assert torch.allclose(fitted.variance(problem.query, of=lambda f: f), fitted.variance(problem.query), rtol=1e-10)


def test_the_variance_of_probabilities_uses_their_slope_at_each_query(make_problem):
    problem = make_problem()
    fitted = fit(problem)
    with torch.no_grad():
        p = problem.model(problem.query).softmax(1)
    slope = p.diag_embed() - p[:, :, None] * p[:, None, :]
    exact = (slope @ fitted.covariance(problem.query) @ slope).diagonal(dim1=1, dim2=2)
    found = fitted.variance(problem.query, of=lambda f: f.softmax(0))
    assert torch.allclose(found, exact, rtol=1e-10)
    gauge = fitted.variance(problem.query, of=lambda f: f - f.mean())
    assert torch.allclose(fitted.variance(problem.query, of=lambda f: (f + 3) - (f + 3).mean()), gauge, rtol=1e-10)


@pytest.mark.parametrize("subset", ["last_layer", "0.*", "*.bias", "2.weight"])
@kinds
def test_a_sub_network_is_nowhere_less_certain_than_the_whole_one(kind, subset, make_problem):
    problem = make_problem(kind)
    whole = fit(problem).variance(problem.query)
    assert bool((fit(problem, subset_of_weights=subset).variance(problem.query) <= whole + 1e-12).all())


@inverses
def test_samples_have_the_mean_of_the_network_and_the_laplace_covariance(inverse, make_problem):
    problem = make_problem()
    fitted = fit(problem, inverse=inverse)
    samples = fitted.sample(problem.query, 20_000)
    assert samples.shape == (20_000, 7, 3)
    with torch.no_grad():
        deviation = samples - problem.model(problem.query)
    exact = fitted.covariance(problem.query)
    tolerance = 6 * float(exact.abs().max()) / math.sqrt(20_000)
    assert torch.allclose(torch.einsum("kmc,kmd->mcd", deviation, deviation) / 20_000, exact, atol=tolerance)
    assert float(deviation.mean(0).abs().max()) < 6 * float(exact.abs().max().sqrt()) / math.sqrt(20_000)


@inverses
def test_samples_are_joint_over_queries(inverse, make_problem, by_hand):
    problem = make_problem("regression")
    reference = by_hand(problem)
    rows = reference.jacobian(problem.query).reshape(14, -1)
    exact = rows @ torch.linalg.solve(reference.precision(), rows.T)
    samples = fit(problem, inverse=inverse).sample(problem.query, 20_000).reshape(20_000, 14)
    assert torch.allclose(samples.T.cov(), exact, atol=6 * float(exact.abs().max()) / math.sqrt(20_000))


@inverses
def test_the_same_seed_gives_the_same_samples_and_another_seed_others(inverse, make_problem):
    problem = make_problem()
    fitted = fit(problem, inverse=inverse)
    first = fitted.sample(problem.query, 4)
    assert torch.equal(first, fitted.sample(problem.query, 4))
    assert not torch.equal(first, fitted.sample(problem.query, 4, seed=1))


def test_the_hessian_is_sampled_from_its_factor_alone(make_problem):
    problem = make_problem(delta=90.0)
    fitted = fit(problem, curvature="hessian", inverse="cholesky")
    samples = fitted.sample(problem.query, 20_000)
    exact = fitted.variance(problem.query)
    assert torch.allclose(samples.var(0), exact, atol=6 * float(exact.max()) / math.sqrt(20_000))
    with pytest.raises(OptionError, match=r'inverse="cg".*inverse="cholesky"'):
        fit(problem, curvature="hessian", inverse="cg").sample(problem.query, 2)


@pytest.mark.parametrize("inverse", ["cholesky", "cg"])
def test_an_indefinite_hessian_is_rejected_with_its_eigenvalues_and_the_remedies(inverse, make_problem, by_hand):
    problem = make_problem("regression", delta=1e-3)
    spectrum = torch.linalg.eigvalsh(by_hand(problem).precision("hessian"))
    assert float(spectrum[0]) < -0.1
    with pytest.raises(
        IndefiniteHessianError, match=r'train longer.*larger prior_precision.*curvature="ggn"'
    ) as caught:
        fit(problem, curvature="hessian", inverse=inverse)
    assert caught.value.smallest == pytest.approx(float(spectrum[0]), rel=1e-6)
    assert caught.value.largest == pytest.approx(float(spectrum[-1]), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"curvature": "hessian", "inverse": "dual"},
        {"curvature": "fisher"},
        {"hessian_structure": "blocks"},
        {"inverse": "lu"},
    ],
    ids=str,
)
def test_a_combination_that_does_not_exist_is_rejected_with_those_that_do(options, make_problem):
    problem = make_problem()
    with pytest.raises(OptionError, match=r"ggn, full, cholesky.*hessian, full, cg"):
        LinearizedLaplace(problem.model, problem.likelihood, **options)
