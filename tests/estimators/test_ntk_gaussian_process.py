"""The process of the linearized network: exact for linear models, and Laplace with a corrected mean otherwise."""

import pytest
import torch
from torch import nn

from estimators import Gaussian, LinearizedLaplace
from estimators.baselines import NTKGaussianProcess
from estimators.errors import OptionError, UnsupportedError

N = 23
GROUPS = {"*bias": 0.7, "*": 3.1}


def rows(kind, n=N):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    f = x @ torch.randn(3, 3, generator=generator, dtype=torch.float64)
    f = f.sin() + 0.3 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, {"regression": f, "classification": f.argmax(-1), "binary": (f > 0).double()}[kind]


def batches(x, y):
    return list(zip(x.split(9), y.split(9), strict=True))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def test_a_linear_model_is_bayesian_linear_regression_wherever_it_was_trained_to():
    x, y = rows("regression")
    sigma, delta, start = torch.tensor([0.5, 0.9, 1.3]).double(), 2.3, 0.4
    process = NTKGaussianProcess(
        nn.Linear(3, 3).double(), Gaussian(sigma), prior_precision=delta, prior_mean=start
    ).fit(batches(x, y))
    query = 2 * x[:5]
    design, at = (torch.cat([t, torch.ones(len(t), 1).double()], 1) for t in (x, query))
    prediction = process.predict(query)
    for c in range(3):
        precision = design.T @ design / sigma[c] ** 2 + delta * torch.eye(4).double()
        weights = torch.linalg.solve(precision, design.T @ y[:, c] / sigma[c] ** 2 + delta * start)
        variance = (at @ torch.linalg.solve(precision, at.T)).diagonal()
        assert torch.allclose(prediction.mean[:, c], at @ weights, rtol=1e-10)
        assert torch.allclose(prediction.epistemic_variance[:, c], variance, rtol=1e-10)


@pytest.mark.parametrize("prior", [1.7, GROUPS])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_in_regression_the_variance_is_that_of_laplace_and_the_mean_is_corrected(prior, subset):
    x, y = rows("regression")
    options = {"prior_precision": prior, "prior_mean": 0.2, "subset_of_weights": subset}
    model, query = network(), 1.5 * x[:6]
    process = NTKGaussianProcess(model, Gaussian(0.6), **options).fit(batches(x, y))
    laplace = LinearizedLaplace(model, Gaussian(0.6), inverse="cholesky", **options).fit(batches(x, y))
    assert torch.allclose(process.variance(query), laplace.variance(query), rtol=1e-10)
    assert torch.allclose(process.joint_covariance(query), laplace.joint_covariance(query), atol=1e-12)
    gradient = laplace.objective_.gradient(laplace.theta_)
    step = -torch.linalg.solve(laplace.posterior_precision(), gradient)
    jacobian, f = laplace.jacobians(query)
    assert torch.allclose(process.displacement_, step, atol=1e-10)
    assert torch.allclose(process.predict(query).mean, f + jacobian @ step, atol=1e-10)


@pytest.mark.parametrize("kind", ["classification", "binary"])
def test_for_classes_the_gradient_of_the_linearized_loss_vanishes(kind):
    x, y = rows(kind)
    model, query = network(), 1.5 * x[:6]
    process = NTKGaussianProcess(model, kind, prior_precision=GROUPS, prior_mean=0.2).fit(batches(x, y))
    jacobian, f = process.jacobians(x)
    delta, theta = process.objective_.prior.precision, process.theta_
    moved = (theta + process.displacement_).requires_grad_()
    at = f + jacobian @ (moved - theta)
    loss = process.likelihood.nll(at, y).sum() + 0.5 * (delta * (moved - 0.2) ** 2).sum()
    (gradient,) = torch.autograd.grad(loss, moved)
    assert gradient.abs().max() < 1e-8
    curvature = torch.einsum("ncp,ncd,ndq->pq", jacobian, process.likelihood.hessian(at.detach()), jacobian)
    at_query, outputs = process.jacobians(query)
    covariance = at_query @ torch.linalg.solve(curvature + torch.diag(delta), at_query.mT)
    assert torch.allclose(process.covariance(query), covariance, atol=1e-10)
    assert torch.allclose(process.predict(query).mean, outputs + at_query @ process.displacement_, atol=1e-10)


def test_samples_are_around_the_corrected_mean():
    x, y = rows("regression")
    process = NTKGaussianProcess(network(), Gaussian(0.6), prior_precision=1.7).fit(batches(x, y))
    samples = process.sample(x[:4], 20_000, seed=2)
    error = process.variance(x[:4]).sqrt() / 20_000**0.5
    assert ((samples.mean(0) - process.predict(x[:4]).mean).abs() < 5 * error).all()
    assert torch.allclose(samples.var(0), process.variance(x[:4]), rtol=0.06)
    spread = (process.sample_weights(20_000, seed=3) - process.theta_ - process.displacement_).T.cov()
    assert (spread - process.posterior_covariance()).abs().max() < 5 * spread.max() * (2 / 20_000) ** 0.5
    weights = process.sample_weights(3, seed=2)
    jacobian, f = process.jacobians(x[:4])
    assert torch.allclose(
        process.sample(x[:4], 3, seed=2), f + torch.einsum("mcp,sp->smc", jacobian, weights - process.theta_)
    )


def test_gradients_by_the_inputs_are_those_of_the_corrected_mean():
    x, y = rows("regression")
    process = NTKGaussianProcess(network(), Gaussian(0.6), prior_precision=1.7).fit(batches(x, y))
    query, step = x[:1].clone().requires_grad_(), 1e-5
    (slope,) = torch.autograd.grad(process.predict(query).mean[0, 1], query)
    for d in range(3):
        shift = torch.zeros(1, 3).double()
        shift[0, d] = step
        ends = [process.predict(x[:1] + sign * shift).mean[0, 1] for sign in (1, -1)]
        assert float(slope[0, d]) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-6)


def test_what_has_no_kernel_matrix_is_an_error():
    x, y = rows("regression")
    with pytest.raises(UnsupportedError, match=r"23 rows with 3 outputs.*\(69, 69\)"):
        NTKGaussianProcess(network(), "regression", max_outputs=68).fit(batches(x, y))
    with pytest.raises(OptionError, match="positive prior_precision"):
        NTKGaussianProcess(network(), "regression", prior_precision={"*bias": 0.0, "*": 1.0}).fit(batches(x, y))
    labels = y.argmax(-1)
    labels[3] = -100
    with pytest.raises(UnsupportedError, match="one label"):
        NTKGaussianProcess(network(), "classification").fit(batches(x, labels))
