"""Predictive distributions: the probit formula, its Monte-Carlo neighbour, calibration, entropy and totals."""

import math
from dataclasses import replace

import pytest
import torch

from estimators import Bernoulli, Categorical, Gaussian, LinearizedLaplace
from estimators.errors import OptionError, UnsupportedError

kinds = pytest.mark.parametrize("kind", ["classification", "binary"])
M, C = 6, 3
LIKELIHOOD = {"regression": Gaussian(0.5), "classification": Categorical(), "binary": Bernoulli()}


def moments():
    generator = torch.Generator().manual_seed(5)
    mean = 2 * torch.randn(M, C, generator=generator, dtype=torch.float64)
    return mean, torch.rand(M, C, generator=generator, dtype=torch.float64)


def link(kind, logits):
    return logits.softmax(-1) if kind == "classification" else logits.sigmoid()


@kinds
def test_probit_probabilities_are_the_link_of_shrunken_logits(kind):
    mean, variance = moments()
    prediction = LIKELIHOOD[kind].predict(mean, variance, None)
    shrunken = torch.stack([mean[:, c] / (1 + math.pi * variance[:, c] / 8) ** 0.5 for c in range(C)], dim=1)
    assert torch.allclose(prediction.probs, link(kind, shrunken), rtol=1e-12)
    assert prediction.link_approx == "probit"
    assert torch.equal(prediction.mean, mean)
    assert torch.equal(prediction.epistemic_variance, variance)


@kinds
def test_without_variance_both_links_are_the_plain_network(kind):
    mean, variance = moments()
    for samples in (None, mean.expand(4, M, C)):
        prediction = LIKELIHOOD[kind].predict(mean, 0 * variance, samples)
        assert torch.allclose(prediction.probs, link(kind, mean), rtol=1e-12)


def test_probit_is_near_the_exact_integral_for_one_bernoulli_output():
    mean, variance = moments()
    grid = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    weight = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    exact = ((mean[..., None] + variance.sqrt()[..., None] * grid).sigmoid() * weight).sum(-1)
    assert torch.allclose(Bernoulli().predict(mean, variance, None).probs, exact, atol=0.01)


@kinds
def test_monte_carlo_probabilities_are_the_mean_of_the_link_over_samples(kind):
    mean, variance = moments()
    noise = torch.randn(11, M, C, dtype=torch.float64)
    samples = mean + variance.sqrt() * noise
    prediction = LIKELIHOOD[kind].predict(mean, variance, samples)
    assert torch.allclose(prediction.probs, torch.stack([link(kind, s) for s in samples]).mean(0), rtol=1e-12)
    assert prediction.link_approx == "mc"


@kinds
def test_the_probit_link_of_a_fitted_network_is_near_its_monte_carlo_link(kind, make_problem):
    problem = make_problem(kind)
    fitted = LinearizedLaplace(problem.model, kind, prior_precision=150.0).fit(problem.loader)
    probit = fitted.predict(problem.query)
    mc = fitted.predict(problem.query, link_approx="mc", n_samples=20_000)
    assert torch.allclose(probit.probs, mc.probs, atol=0.004)
    assert torch.equal(probit.epistemic_variance, mc.epistemic_variance)


@kinds
def test_entropy_is_minus_the_expected_log_probability(kind):
    prediction = LIKELIHOOD[kind].predict(*moments(), None)
    p = prediction.probs
    expected = -(p * p.log()).sum(-1) if kind == "classification" else -(p * p.log() + (1 - p) * (1 - p).log())
    assert torch.allclose(prediction.entropy, expected, rtol=1e-12)


@kinds
def test_entropy_of_a_certain_prediction_is_zero_and_finite(kind):
    f = torch.tensor([[1e4, -1e4, -1e4]], dtype=torch.float64)
    entropy = LIKELIHOOD[kind].predict(f, torch.zeros_like(f), None).entropy
    assert torch.equal(entropy, torch.zeros_like(entropy))


@pytest.mark.parametrize("sigma", [0.5, torch.tensor([0.2, 1.0, 3.0])])
def test_the_total_variance_of_regression_is_epistemic_plus_noise(sigma):
    mean, variance = moments()
    prediction = Gaussian(sigma).predict(mean, variance, None)
    noise = torch.as_tensor(sigma, dtype=torch.float64) ** 2
    assert torch.allclose(prediction.total_variance, variance + noise, rtol=1e-12)
    assert prediction.aleatoric_variance.shape == (M, C)
    assert prediction.probs is None
    assert prediction.entropy is None


@kinds
def test_calibrated_is_a_prediction_from_rescaled_moments(kind):
    mean, variance = moments()
    found = LIKELIHOOD[kind].predict(mean, variance, None).calibrated(variance_scale=1.7, softmax_temperature=2.0)
    expected = LIKELIHOOD[kind].predict(mean / 2, 1.7 * variance / 4, None)
    for name in ("mean", "epistemic_variance", "probs", "entropy"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)


@kinds
def test_calibration_by_one_changes_nothing(kind):
    prediction = LIKELIHOOD[kind].predict(*moments(), None)
    assert torch.allclose(prediction.calibrated().probs, prediction.probs, rtol=1e-15)


@kinds
def test_a_scale_of_zero_is_the_plain_network(kind):
    mean, variance = moments()
    prediction = LIKELIHOOD[kind].predict(mean, variance, None).calibrated(variance_scale=0.0)
    assert torch.allclose(prediction.probs, link(kind, mean), rtol=1e-12)


def test_a_variance_scale_leaves_the_noise_of_regression_alone():
    mean, variance = moments()
    prediction = Gaussian(0.5).predict(mean, variance, None).calibrated(variance_scale=3.0)
    assert torch.allclose(prediction.epistemic_variance, 3 * variance, rtol=1e-12)
    assert torch.allclose(prediction.total_variance, 3 * variance + 0.25, rtol=1e-12)
    assert torch.equal(prediction.mean, mean)


@pytest.mark.parametrize("scale", [-0.1, float("nan"), float("inf")])
def test_a_variance_scale_that_is_none_is_rejected(scale):
    with pytest.raises(OptionError, match="variance_scale"):
        Categorical().predict(*moments(), None).calibrated(variance_scale=scale)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_rejected(temperature):
    with pytest.raises(OptionError, match="softmax_temperature"):
        Categorical().predict(*moments(), None).calibrated(softmax_temperature=temperature)


def test_regression_has_no_temperature():
    with pytest.raises(UnsupportedError, match=r"softmax_temperature = 1.*2\.0"):
        Gaussian().predict(*moments(), None).calibrated(softmax_temperature=2.0)


@kinds
def test_a_monte_carlo_prediction_is_calibrated_by_its_samples(kind):
    mean, variance = moments()
    samples = mean + variance.sqrt() * torch.randn(7, M, C, dtype=torch.float64)
    prediction = LIKELIHOOD[kind].predict(mean, variance, samples)
    found = prediction.calibrated(variance_scale=2.25, softmax_temperature=3.0)
    moved = torch.stack([(mean + 1.5 * (one - mean)) / 3 for one in samples])
    assert torch.allclose(found.samples, moved, rtol=1e-12)
    assert torch.allclose(found.probs, torch.stack([link(kind, one) for one in moved]).mean(0), rtol=1e-12)
    assert torch.allclose(found.mean, mean / 3, rtol=1e-12)
    assert torch.allclose(found.epistemic_variance, variance * 0.25, rtol=1e-12)
    assert found.link_approx == "mc"
    once_more = prediction.calibrated(variance_scale=1.5).calibrated(variance_scale=1.5, softmax_temperature=3.0)
    assert torch.allclose(once_more.probs, found.probs, rtol=1e-12)


@kinds
def test_a_monte_carlo_prediction_without_its_samples_cannot_be_calibrated(kind):
    mean, variance = moments()
    prediction = replace(LIKELIHOOD[kind].predict(mean, variance, mean[None]), samples=None)
    with pytest.raises(UnsupportedError, match=r'samples.*"mc"'):
        prediction.calibrated(variance_scale=2.0)


def test_samples_of_a_regression_are_spread_about_their_mean_and_the_noise_stays():
    samples = torch.randn(5, M, C, dtype=torch.float64)
    made = replace(Gaussian(0.5).predict(samples.mean(0), samples.var(0), None), samples=samples)
    found = made.calibrated(variance_scale=4.0)
    assert torch.allclose(found.samples.mean(0), samples.mean(0), atol=1e-12)
    assert torch.allclose(found.samples.var(0), found.epistemic_variance, rtol=1e-12)
    assert torch.allclose(found.total_variance, 4 * samples.var(0) + 0.25, rtol=1e-12)


def test_regression_rejects_the_monte_carlo_link_rather_than_ignore_it(make_problem):
    problem = make_problem("regression")
    fitted = LinearizedLaplace(problem.model, problem.likelihood).fit(problem.loader)
    with pytest.raises(UnsupportedError, match='"mc"'):
        fitted.predict(problem.query, link_approx="mc")


@pytest.mark.parametrize("bad", ["laplace", None, "MC"])
def test_an_unknown_link_is_rejected(bad, make_problem):
    problem = make_problem()
    fitted = LinearizedLaplace(problem.model, problem.likelihood).fit(problem.loader)
    with pytest.raises(OptionError, match="link_approx"):
        fitted.predict(problem.query, link_approx=bad)


@pytest.mark.parametrize("n", [0, -3])
def test_fewer_than_one_sample_is_rejected(n, make_problem):
    problem = make_problem()
    fitted = LinearizedLaplace(problem.model, problem.likelihood).fit(problem.loader)
    with pytest.raises(OptionError, match=f"n_samples >= 1.*{n}"):
        fitted.sample(problem.query, n)
    with pytest.raises(OptionError, match=f"n_samples >= 1.*{n}"):
        fitted.predict(problem.query, link_approx="mc", n_samples=n)
