"""Gaussian processes against dense formulas and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF as SklearnRBF
from sklearn.gaussian_process.kernels import ConstantKernel, WhiteKernel
from torch import nn
from torch.nn import functional as F

from estimators import Categorical, Gaussian
from estimators.baselines import GaussianProcess
from estimators.errors import ConvergenceError, OptionError, UnsupportedError

N, M, D, C = 26, 5, 2, 3
OUTPUTS = {"regression": 2, "classification": C, "binary": 2}


def rows(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, query = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, M))
    f = torch.sin(2 * x @ torch.randn(D, OUTPUTS[kind], generator=generator, dtype=torch.float64))
    f = f + 0.4 * torch.randn(f.shape, generator=generator, dtype=torch.float64)
    return x, {"regression": 3 + 2 * f, "classification": f.argmax(-1), "binary": (f > 0).double()}[kind], query


def fitted(kind, likelihood=None, **options):
    x, y, query = rows(kind)
    model = nn.Linear(D, OUTPUTS[kind]).double()
    loader = list(zip(x.split(11), y.split(11), strict=True))
    return GaussianProcess(model, likelihood or kind, **options).fit(loader), x, y, query


def rbf(x, z, amplitude, lengthscale):
    return amplitude**2 * np.exp(-0.5 * ((x[:, None] - z[None]) ** 2).sum(-1) / lengthscale**2)


@pytest.mark.parametrize("sigma", [0.6, (0.5, 1.4)])
def test_regression_is_the_closed_form(sigma):
    sigmas = torch.tensor(sigma, dtype=torch.float64)
    process, x, y, query = fitted("regression", Gaussian(sigmas), amplitude=1.7, lengthscale=0.8)
    k, cross = rbf(x.numpy(), x.numpy(), 1.7, 0.8), rbf(x.numpy(), query.numpy(), 1.7, 0.8)
    evidence = 0.0
    for c in range(2):
        noisy = k + float(sigmas.expand(2)[c]) ** 2 * np.eye(N)
        centred = y[:, c].numpy() - y[:, c].mean().item()
        mean = y[:, c].mean().item() + cross.T @ np.linalg.solve(noisy, centred)
        variance = 1.7**2 - np.einsum("nm,nm->m", cross, np.linalg.solve(noisy, cross))
        assert process.predict(query).mean[:, c].numpy() == pytest.approx(mean, rel=1e-9)
        assert process.variance(query)[:, c].numpy() == pytest.approx(variance, rel=1e-8)
        evidence += -0.5 * centred @ np.linalg.solve(noisy, centred) - 0.5 * np.linalg.slogdet(2 * np.pi * noisy)[1]
    assert process.log_marginal_likelihood_ == pytest.approx(evidence, rel=1e-10)


def test_regression_with_the_marginal_likelihood_is_that_of_scikit_learn():
    x, y, query = rows("regression")
    y = y[:, :1]
    process = GaussianProcess(nn.Linear(D, 1).double(), Gaussian(0.8)).fit([(x, y)])
    kernel = ConstantKernel(4.0) * SklearnRBF(1.0) + WhiteKernel(0.64, "fixed")
    peer = GaussianProcessRegressor(kernel, alpha=0.0).fit(x.numpy(), (y - y.mean()).numpy()[:, 0])
    assert process.log_marginal_likelihood_ == pytest.approx(peer.log_marginal_likelihood_value_, abs=1e-4)
    assert process.lengthscale_ == pytest.approx(peer.kernel_.k1.k2.length_scale, rel=2e-2)
    mean, std = peer.predict(query.numpy(), return_std=True)
    assert process.predict(query).mean[:, 0].numpy() == pytest.approx(mean + y.mean().item(), abs=0.02)
    assert process.predict(query).total_variance[:, 0].sqrt().numpy() == pytest.approx(std, rel=0.02)


def test_one_binary_output_is_that_of_scikit_learn():
    x, y, query = rows("binary")
    peer = GaussianProcessClassifier(ConstantKernel(2.0) * SklearnRBF(1.0)).fit(x.numpy(), y[:, 0].numpy())
    options = {"amplitude": math.sqrt(peer.kernel_.k1.constant_value), "lengthscale": peer.kernel_.k2.length_scale}
    model = nn.Linear(D, 1).double()
    same = GaussianProcess(model, "binary", **options).fit([(x, y[:, :1])])
    assert same.log_marginal_likelihood_ == pytest.approx(peer.log_marginal_likelihood_value_, rel=1e-8)
    mean, variance = peer.latent_mean_and_variance(query.numpy())
    assert same.predict(query).mean[:, 0].numpy() == pytest.approx(mean, abs=1e-6)
    assert same.variance(query)[:, 0].numpy() == pytest.approx(variance, rel=1e-6)
    own = GaussianProcess(model, "binary").fit([(x, y[:, :1])])
    assert own.log_marginal_likelihood_ == pytest.approx(peer.log_marginal_likelihood_value_, abs=1e-3)


def dense_laplace(kernel, y, steps=60):
    """Mode, −½ fᵀK⁻¹f + log p − ½ log|I + KW|, and (K + W⁻¹)⁻¹, over all N·C latent values as one vector."""
    n = len(y)
    joint = torch.kron(kernel, torch.eye(C, dtype=torch.float64))
    f = torch.zeros(n * C, dtype=torch.float64)
    for _ in range(steps):
        p = f.reshape(n, C).softmax(-1)
        w = torch.block_diag(*(torch.diag(row) - torch.outer(row, row) for row in p))
        gradient = (F.one_hot(y, C) - p).flatten()
        f = joint @ torch.linalg.solve(torch.eye(n * C).double() + w @ joint, w @ f + gradient)
    a = torch.linalg.solve(joint, f)
    evidence = -0.5 * f @ a - F.cross_entropy(f.reshape(n, C), y, reduction="sum")
    evidence -= 0.5 * torch.linalg.slogdet(torch.eye(n * C).double() + joint @ w)[1]
    return joint, gradient, evidence, torch.linalg.solve(torch.eye(n * C).double() + w @ joint, w)


def test_classes_are_those_of_the_dense_laplace_approximation():
    options = {"amplitude": 1.6, "lengthscale": 0.9}
    process, x, y, query = fitted("classification", **options)
    k = torch.from_numpy(rbf(x.numpy(), x.numpy(), 1.6, 0.9)) + 1e-10 * torch.eye(N)
    _, gradient, evidence, inner = dense_laplace(k, y)
    cross = torch.kron(torch.from_numpy(rbf(x.numpy(), query.numpy(), 1.6, 0.9)), torch.eye(C).double())
    prior = torch.kron(torch.from_numpy(rbf(query.numpy(), query.numpy(), 1.6, 0.9)), torch.eye(C).double())
    covariance = (prior - cross.T @ inner @ cross).reshape(M, C, M, C)
    assert torch.allclose(process.predict(query).mean, (cross.T @ gradient).reshape(M, C), atol=1e-7)
    assert torch.allclose(process.joint_covariance(query), covariance, atol=1e-7)
    blocks = torch.stack([covariance[m, :, m] for m in range(M)])
    assert torch.allclose(process.covariance(query), blocks, atol=1e-7)
    assert process.log_marginal_likelihood_ == pytest.approx(float(evidence), rel=1e-7)


@pytest.mark.parametrize("kind", ["regression", "classification", "binary"])
def test_the_search_ends_where_the_evidence_has_no_slope(kind):
    process, x, y, _ = fitted(kind)
    best, step = process.log_marginal_likelihood_, 1.02
    amplitude, lengthscale = process.amplitude_, process.lengthscale_
    for options in ((amplitude * step, lengthscale), (amplitude, lengthscale * step), (amplitude, lengthscale / step)):
        other = GaussianProcess(process.model, kind, amplitude=options[0], lengthscale=options[1]).fit([(x, y)])
        assert 0 <= best - other.log_marginal_likelihood_ < 0.05


def test_samples_have_the_joint_moments():
    process, _, _, query = fitted("classification", amplitude=1.6, lengthscale=0.9)
    samples = process.sample(query, 20_000, seed=1)
    mean, covariance = process.predict(query).mean, process.joint_covariance(query).reshape(M * C, -1)
    assert (samples.mean(0) - mean).abs().max() < 5 * process.variance(query).max().sqrt() / 20_000**0.5
    assert torch.allclose(
        samples.flatten(1).T.cov(), covariance, atol=5 * float(covariance.max()) * (2 / 20_000) ** 0.5
    )


def test_class_probabilities_are_averages_over_samples_of_each_row():
    process, _, _, query = fitted("classification", amplitude=5.0, lengthscale=0.9)
    prediction = process.predict(query, n_samples=50_000)
    draws = torch.distributions.MultivariateNormal(process.predict(query).mean, process.covariance(query))
    torch.manual_seed(1)
    expected = draws.sample((50_000,)).softmax(-1).mean(0)
    assert (prediction.probs - expected).abs().max() < 0.01
    alone = process.predict(query[2:3]).probs[0]
    torch.testing.assert_close(alone, process.predict(query).probs[2], rtol=1e-10, atol=0)  # the same samples
    probit = process.predict(query, link_approx="probit").probs
    assert (probit - expected).abs().max() > 0.05  # the common shift of the latent functions is no uncertainty


def test_far_from_the_data_the_variance_is_that_of_the_prior():
    process, x, _, _ = fitted("regression", amplitude=1.7, lengthscale=0.8)
    assert process.variance(100 * x[:3]).numpy() == pytest.approx(1.7**2)


@pytest.mark.parametrize("sigma", [0.03, 0.01, 1e-3])
def test_regression_with_little_noise_is_the_closed_form(sigma):
    """Two outputs that are linear in the input, for which the marginal likelihood prefers a large s and ℓ."""
    generator = torch.Generator().manual_seed(2)
    x = 2 * torch.rand(100, 1, generator=generator, dtype=torch.float64) - 1
    y = torch.cat([2 * x, 1 - x], 1) + sigma * torch.randn(100, 2, generator=generator, dtype=torch.float64)
    process = GaussianProcess(nn.Linear(1, 2).double(), Gaussian(sigma)).fit([(x, y)])
    assert process.amplitude_ > 3
    query = torch.linspace(-0.9, 0.9, 5)[:, None].double()
    cross, k = (rbf(x.numpy(), z.numpy(), process.amplitude_, process.lengthscale_) for z in (query, x))
    centred, noisy = (y - y.mean(0)).numpy(), k + sigma**2 * np.eye(100)
    mean = y.mean(0).numpy() + cross.T @ np.linalg.solve(noisy, centred)
    assert process.predict(query).mean.numpy() == pytest.approx(mean, abs=0.01 * sigma)
    fit, log_det = (centred * np.linalg.solve(noisy, centred)).sum(), np.linalg.slogdet(2 * np.pi * noisy)[1]
    assert process.log_marginal_likelihood_ == pytest.approx(-0.5 * fit - log_det, rel=1e-5)
    lower = GaussianProcess(process.model, Gaussian(sigma), amplitude=1.0, lengthscale=1.0).fit([(x, y)])
    assert lower.log_marginal_likelihood_ < process.log_marginal_likelihood_


def test_a_covariance_that_is_indefinite_by_round_off_is_an_error():
    x, y, _ = rows("regression")
    process = GaussianProcess(nn.Linear(D, 2).double(), Gaussian(1e-6), amplitude=1e4, lengthscale=30.0)
    with pytest.raises(ConvergenceError, match="positive definite"):
        process.fit([(x, y)])


@pytest.mark.parametrize("offset", [1e6, 1e8])
@pytest.mark.parametrize("options", [{"amplitude": 1.7, "lengthscale": 0.8}, {}])
def test_inputs_far_from_zero_have_the_same_process(options, offset):
    near, x, y, query = fitted("regression", **options)
    far = GaussianProcess(near.model, "regression", **options).fit([(x + offset, y)])
    rtol = 1e-13 * offset
    assert torch.allclose(far.predict(query + offset).mean, near.predict(query).mean, rtol=rtol, atol=rtol)
    assert torch.allclose(far.joint_covariance(query + offset), near.joint_covariance(query), rtol=rtol, atol=rtol)
    loaded = GaussianProcess(near.model, "regression", **options).load_state_dict(far.state_dict())
    assert torch.equal(loaded.variance(query + offset), far.variance(query + offset))


def test_what_is_too_large_or_of_another_kind_is_an_error():
    x, y, _ = rows("regression")
    model = nn.Linear(D, 2).double()
    with pytest.raises(UnsupportedError, match=r"26 rows.*kernel matrices \(26, 26\)"):
        GaussianProcess(model, "regression", max_rows=20).fit([(x, y)])
    with pytest.raises(OptionError, match="lengthscale"):
        GaussianProcess(model, "regression", lengthscale=0)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model

        def forward(self, features):
            return self.layer(features)

    with pytest.raises(UnsupportedError, match="NTKGaussianProcess"):
        GaussianProcess(Named(), "regression").fit([({"features": x}, y)])

    class Other(Categorical):
        pass

    with pytest.raises(UnsupportedError, match="Other"):
        GaussianProcess(model, Other()).fit([(x, y.argmax(-1))])
