"""The low-rank structure: eigen-truncation of the whitened GGN, from products alone."""

import pytest
import torch
from torch import nn

from estimators import Gaussian, LinearizedLaplace
from estimators.errors import OptionError
from estimators.runtime.rng import preserved_random_state

PRIORS = {"one": 1.7, "by name": {"0.*": 0.6, "*bias": 4.0, "*": 2.5}}


def fitted(delta, rank, *, kind="regression", structure="lowrank", dtype=torch.float64, inverse="auto"):
    generator = torch.Generator().manual_seed(5)
    x = 2 * torch.randn(53, 4, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(53, 3, generator=generator, dtype=torch.float64).to(dtype)
    y = y if kind == "regression" else y.argmax(1)
    with preserved_random_state():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype).eval()
    options = {"rank": rank} if structure == "lowrank" else {}
    estimator = LinearizedLaplace(
        model,
        Gaussian(0.6) if kind == "regression" else kind,
        prior_precision=delta,
        hessian_structure=structure,
        inverse=inverse,
        **options,
    )
    loader = [(x[start : start + 20], y[start : start + 20]) for start in (0, 20, 40)]
    return estimator.fit(loader), 1.5 * torch.randn(7, 4, generator=generator, dtype=torch.float64).to(dtype)


def whitened(delta, kind):
    """δ^(−½) G δ^(−½) and δ, dense."""
    exact, x = fitted(delta, None, kind=kind, structure="full", inverse="cholesky")
    prior = exact.objective_.prior.precision
    return exact.data_curvature_.matrix / (prior.outer(prior)).sqrt(), prior, exact, x


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("delta", PRIORS.values(), ids=PRIORS)
def test_with_every_direction_it_is_exact(kind, delta):
    _, _, exact, x = whitened(delta, kind)
    all_of_them, _ = fitted(delta, 75, kind=kind)
    assert torch.allclose(all_of_them.variance(x), exact.variance(x), rtol=1e-8)
    assert torch.allclose(all_of_them.covariance(x), exact.covariance(x), rtol=1e-7, atol=1e-11)
    evidence = all_of_them.log_marginal_likelihood()
    assert float(evidence) == pytest.approx(float(exact.log_marginal_likelihood()), rel=1e-9)


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("delta", PRIORS.values(), ids=PRIORS)
def test_a_few_directions_are_the_leading_eigenpairs(kind, delta):
    matrix, prior, exact, x = whitened(delta, kind)
    values, vectors = torch.linalg.eigh(matrix)
    estimator, _ = fitted(delta, 6, kind=kind)
    assert torch.allclose(estimator.eigenvalues_, values.flip(0)[:6], rtol=1e-4)
    jacobian = exact.network_.jacobian(x) / prior.sqrt()
    leading, directions = values[-6:], vectors[:, -6:]
    taken = ((jacobian @ directions).square() * leading / (1 + leading)).sum(-1)
    assert torch.allclose(estimator.variance(x), jacobian.square().sum(-1) - taken, rtol=2e-3)


def test_it_never_says_less_than_the_exact_variance_and_comes_nearer_with_every_rank():
    exact, x = fitted(1.7, None, structure="full")
    variances = torch.stack([fitted(1.7, rank)[0].variance(x) for rank in (1, 3, 8, 20, 40)])
    assert bool((variances >= exact.variance(x) * (1 - 1e-10)).all())
    assert bool((variances.diff(dim=0) <= 1e-10).all())
    assert float((variances[-1] / exact.variance(x)).max()) < 1.1


def test_samples_have_its_covariance():
    estimator, x = fitted(PRIORS["by name"], 10)
    samples = estimator.sample(x[:2], 20_000)
    flat = (samples - samples.mean(0))[:, 0]
    assert torch.allclose(flat.T @ flat / 20_000, estimator.covariance(x[:1])[0], rtol=0.1, atol=0.02)


def test_float32_agrees_and_another_prior_costs_no_pass():
    double, x = fitted(1.7, 10)
    single, _ = fitted(1.7, 10, dtype=torch.float32)
    assert torch.allclose(single.variance(x.float()).double(), double.variance(x), rtol=1e-3)
    fresh, _ = fitted(3.0, 75)
    kept, _ = fitted(1.7, 75)
    assert float(kept.log_marginal_likelihood(3.0)) == pytest.approx(float(fresh.log_marginal_likelihood()), rel=1e-9)


def test_it_is_saved(tmp_path):
    estimator, x = fitted(1.7, 5)
    estimator.save(tmp_path / "fit")
    again = LinearizedLaplace(
        estimator.model, estimator.likelihood, prior_precision=1.7, hessian_structure="lowrank", rank=5
    ).load(tmp_path / "fit")
    assert torch.allclose(again.variance(x), estimator.variance(x), rtol=1e-12)
    assert torch.allclose(again.eigenvalues_, estimator.eigenvalues_, rtol=1e-12)


def test_what_it_cannot_do_is_rejected():
    with pytest.raises(OptionError, match="positive prior_precision"):
        fitted({"*bias": 0.0, "*": 1.0}, 5)
    for rank in (0, 2.5):
        with pytest.raises(OptionError, match="rank >= 1"):
            LinearizedLaplace(nn.Linear(2, 1), "regression", hessian_structure="lowrank", rank=rank)
    with pytest.raises(OptionError, match="lowrank"):
        _ = fitted(1.0, None, structure="full")[0].eigenvalues_
    with pytest.raises(OptionError, match="ggn, lowrank, dual"):
        LinearizedLaplace(nn.Linear(2, 1), "regression", hessian_structure="lowrank", curvature="hessian")
