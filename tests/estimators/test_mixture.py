"""A mixture has the moments of the laws of total expectation and variance, and averages probabilities."""

import copy
import math

import pytest
import torch
from torch import nn

from estimators import Gaussian, LastLayerLaplace, LinearizedLaplace, LinearResponse, MeanAbsolute, RegVar, calibrate
from estimators.baselines import MAP, SWAG, DeepEnsemble, Mixture, RetrainedMixture
from estimators.baselines.mixture import _apportioned
from estimators.errors import ModelChangedError, NotFittedError, OptionError, StateError, UnsupportedError
from estimators.likelihoods.mixture_prediction import mixture_of_gaussians
from estimators.training import Recipe

SHORT = Recipe(epochs=3, batch_size=7)
DESCENT = Recipe(epochs=4, batch_size=7, optimizer="sgd", lr=0.02, schedule="constant")
WEIGHTS = [0.5, 2.0, 1.5]
W = torch.tensor(WEIGHTS).double() / 4


def network(outputs=3, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, outputs)).double().eval()


def laplaces(problem):
    """Laplace of three structures at three networks, with different priors."""
    outputs = 3 if problem.kind == "classification" else 2
    options = [{"prior_precision": 2.5}, {"prior_precision": 0.7, "hessian_structure": "kron"}, {"prior_mean": 0.2}]
    return [
        LinearizedLaplace(network(outputs, seed), problem.likelihood, **options[seed]) for seed in range(len(options))
    ]


@pytest.fixture(params=["regression", "classification", "binary"])
def problem(request, make_problem):
    return make_problem(request.param)


def moments(fitted, x):
    """Means and joint covariances of components, each fitted alone."""
    means = torch.stack([member.model(x).detach() for member in fitted])
    return means, torch.stack([member.joint_covariance(x) for member in fitted])


def test_the_moments_are_those_of_the_laws_of_total_expectation_and_variance(problem):
    x = problem.query
    alone = [member.fit(problem.loader) for member in laplaces(problem)]
    mixture = Mixture(laplaces(problem), weights=WEIGHTS).fit(problem.loader)
    means, covariances = moments(alone, x)
    mean = torch.einsum("k,kmc->mc", W, means)
    second = torch.einsum("k,kmcnd->mcnd", W, covariances) + torch.einsum("k,kmc,knd->mcnd", W, means, means)
    joint = second - torch.einsum("mc,nd->mcnd", mean, mean)  # E f fᵀ − E f E fᵀ
    assert torch.allclose(mixture.joint_covariance(x), joint, rtol=1e-9, atol=1e-12)
    covariance = torch.einsum("mcmd->mcd", joint)
    assert torch.allclose(mixture.covariance(x), covariance, rtol=1e-9, atol=1e-12)
    variance = covariance.diagonal(dim1=1, dim2=2)
    assert torch.allclose(mixture.variance(x), variance, rtol=1e-9)
    prediction = mixture.predict_uncalibrated(x)
    assert torch.allclose(prediction.mean, mean, rtol=1e-12)
    assert torch.allclose(prediction.epistemic_variance, variance, rtol=1e-9)
    if problem.kind == "regression":
        assert torch.allclose(prediction.total_variance, variance + 0.6**2, rtol=1e-9)
    slopes = torch.zeros(len(x), 1, mean.shape[1]).double()
    slopes[:, 0, 0], slopes[:, 0, 1] = 2 * mean[:, 0], -1.0  # of f₀² − f₁
    by_hand = torch.einsum("mdc,mce,mde->md", slopes, covariance, slopes)
    assert torch.allclose(mixture.variance(x, of=lambda f: f[0] ** 2 - f[1]), by_hand, rtol=1e-9)


def test_probabilities_are_averaged(problem):
    if problem.kind == "regression":
        return
    x = problem.query
    alone = [member.fit(problem.loader) for member in laplaces(problem)]
    mixture = Mixture(laplaces(problem), weights=WEIGHTS).fit(problem.loader)
    expected = sum(w * member.predict_uncalibrated(x).probs for w, member in zip(W, alone, strict=True))
    prediction = mixture.predict_uncalibrated(x)
    assert torch.allclose(prediction.probs, expected, rtol=1e-12)
    p = expected if problem.kind == "classification" else torch.stack([expected, 1 - expected])
    entropy = -(p * p.log()).sum(-1 if problem.kind == "classification" else 0)
    assert torch.allclose(prediction.entropy, entropy, rtol=1e-9)
    assert not torch.allclose(expected, (mixture.predict_uncalibrated(x, link_approx="mc").probs), rtol=1e-3)
    sampled = mixture.predict_uncalibrated(x, link_approx="mc", n_samples=40_000).probs
    assert float((sampled - expected).abs().max()) < 0.05  # the probit approximation, and 40,000 samples


def test_a_calibrated_mixture_scales_the_whole_covariance():
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    variances = torch.rand(5, 3, 4, generator=generator, dtype=torch.float64)
    s, t = 0.3, 1.7
    found = mixture_of_gaussians(means, variances, W.tolist(), kind="classification").calibrated(
        variance_scale=s, softmax_temperature=t
    )
    mean = torch.einsum("k,mkc->mc", W, means)
    expected = torch.zeros(5, 4).double()
    for k in range(3):
        logits = (mean + math.sqrt(s) * (means[:, k] - mean)) / t
        expected += W[k] * (logits / (1 + math.pi / 8 * s * variances[:, k] / t**2).sqrt()).softmax(-1)
    assert torch.allclose(found.probs, expected, rtol=1e-12)
    before = mixture_of_gaussians(means, variances, W.tolist(), kind="classification")
    assert torch.allclose(found.epistemic_variance, s / t**2 * before.epistemic_variance, rtol=1e-12)
    assert torch.allclose(found.mean, mean / t, rtol=1e-12)


@pytest.mark.filterwarnings("ignore::estimators.errors.TuningBoundaryWarning")
def test_a_mixture_is_calibrated_on_validation_rows(make_problem):
    problem = make_problem("classification")
    mixture = Mixture(laplaces(problem)).fit(problem.loader)
    y = torch.arange(7) % 3
    chosen = calibrate(mixture.predict_uncalibrated(problem.query), y, refine=False)
    nll = -chosen.apply(mixture.predict_uncalibrated(problem.query)).log_probs[torch.arange(7), y].mean()
    assert float(nll) == pytest.approx(chosen.score, rel=1e-9)
    in_fit = Mixture(laplaces(problem)).fit(
        problem.loader, val_loader=[(problem.query[:4], y[:4]), (problem.query[4:], y[4:])]
    )
    nll = -in_fit.predict(problem.query).log_probs[torch.arange(7), y].mean()
    assert float(nll) <= chosen.score + 0.05


def test_a_mixture_of_networks_has_the_variance_of_an_ensemble_with_the_divisor_k(make_problem):
    problem = make_problem("regression")
    networks = [network(2, seed) for seed in range(4)]
    mixture = Mixture([MAP(model, problem.likelihood) for model in networks]).fit(problem.loader)
    ensemble = DeepEnsemble(networks[0], problem.likelihood, members=networks[1:]).fit(problem.loader)
    assert torch.allclose(mixture.variance(problem.query), 3 / 4 * ensemble.variance(problem.query), rtol=1e-9)


def test_samples_have_the_moments_of_the_mixture(problem):
    mixture = Mixture(laplaces(problem), weights=WEIGHTS).fit(problem.loader)
    x, n = problem.query[:3], 40_000
    samples = mixture.sample(x, n, seed=3)
    covariance = mixture.joint_covariance(x).flatten(2).flatten(0, 1)
    found = torch.cov(samples.flatten(1).T)
    scale = covariance.diagonal().sqrt()
    assert float(((found - covariance) / torch.outer(scale, scale)).abs().max()) < 8 / math.sqrt(n)
    mean = mixture.predict_uncalibrated(x).mean
    assert float(((samples.mean(0) - mean).flatten() / scale).abs().max()) < 5 / math.sqrt(n)
    first = samples[:100] - mean
    assert float(first.mean(0).flatten().abs().max()) < float(scale.max())  # components alternate


def test_multi_swag_averages_over_all_networks(make_problem):
    problem = make_problem("classification")
    swags = [SWAG(network(3, seed), "classification", recipe=DESCENT, n_samples=4, seed=seed) for seed in range(2)]
    mixture = Mixture(swags).fit(problem.loader)
    alone = [
        SWAG(s.model, "classification", recipe=DESCENT, n_samples=4, seed=s.seed).fit(problem.loader) for s in swags
    ]
    outputs = torch.cat([swag.member_outputs(problem.query) for swag in alone])
    prediction = mixture.predict_uncalibrated(problem.query)
    assert torch.allclose(prediction.probs, outputs.softmax(-1).mean(0), rtol=1e-10)
    assert torch.allclose(prediction.mean, outputs.mean(0), rtol=1e-10)


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_a_prediction_evaluates_the_networks_of_a_component_once_for_its_moments(make_problem, monkeypatch, kind):
    problem = make_problem(kind)
    outputs = 3 if kind == "classification" else 2
    swags = [SWAG(network(outputs, seed), kind, recipe=DESCENT, n_samples=4, seed=seed) for seed in range(2)]
    mixture = Mixture(swags, weights=[1.0, 3.0]).fit(problem.loader)
    calls, plain = [], SWAG._members
    monkeypatch.setattr(SWAG, "_members", lambda self, x: calls.append(self) or plain(self, x))
    mixture.predict_uncalibrated(problem.query, link_approx="probit")
    assert len(calls) == 2


def test_a_retrained_mixture_has_the_networks_of_an_ensemble_of_its_seed(make_problem):
    problem = make_problem("classification", network())
    options = {"make_model": network, "recipe": SHORT, "n_members": 3, "seed": 5}
    mixture = RetrainedMixture(MAP(problem.model, "classification", prior_precision=2.5), **options)
    mixture = mixture.fit(problem.loader)
    ensemble = DeepEnsemble(problem.model, "classification", prior_precision=2.5, **options).fit(problem.loader)
    outputs = torch.stack([member.model(problem.query) for member in mixture.members_])
    assert torch.allclose(outputs, ensemble.member_outputs(problem.query), rtol=1e-10)
    assert mixture.fit_report_.passes["training"] == pytest.approx(6)
    assert mixture.retrains


def test_the_networks_are_trained_with_the_prior_mean(make_problem):
    """A linear network has one minimum, which is known; the prior mean is one number per output and input."""
    problem = make_problem("regression", nn.Linear(4, 2))
    sigma, delta = problem.likelihood.sigma_noise, torch.tensor([3.0] * 4 + [0.5]).double()
    mean = {"weight": torch.linspace(-2, 3, 8).reshape(2, 4).double(), "bias": torch.tensor([1.0, -4.0]).double()}
    prior = {"prior_precision": {"weight": 3.0, "bias": 0.5}, "prior_mean": mean}
    recipe = Recipe(epochs=400, batch_size=20, optimizer="nesterov", lr=0.2)
    laplace = LinearizedLaplace(problem.model, problem.likelihood, **prior)
    options = {"make_model": lambda: nn.Linear(4, 2).double(), "recipe": recipe, "n_members": 2}
    trained = RetrainedMixture(laplace, **options).fit(problem.loader).members_[1].model
    x = torch.cat([problem.x, torch.ones(20, 1).double()], 1)
    of_prior = delta * torch.cat([mean["weight"], mean["bias"][:, None]], 1)
    expected = torch.linalg.solve(x.T @ x / sigma**2 + delta.diag(), x.T @ problem.y / sigma**2 + of_prior.T).T
    found = torch.cat([trained.weight, trained.bias[:, None]], 1)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_prior_of_some_weights_cannot_train_networks(make_problem):
    problem = make_problem("regression", network(2))
    for prior in ({"prior_precision": {"3.*": 2.0}}, {"prior_mean": {"3.*": 2.0}}, {"prior_mean": torch.ones(12)}):
        laplace = LastLayerLaplace(problem.model, problem.likelihood, **prior)
        mixture = RetrainedMixture(laplace, make_model=lambda: network(2, 4), recipe=SHORT, n_members=2)
        with pytest.raises(OptionError, match=next(iter(prior))):
            mixture.fit(problem.loader)


def test_a_retrained_mixture_is_loaded_without_training(make_problem, tmp_path, monkeypatch):
    problem = make_problem("classification", network())
    laplace = LastLayerLaplace(problem.model, "classification", prior_precision=2.5)
    options = {"make_model": network, "recipe": SHORT, "n_members": 3}
    fitted = RetrainedMixture(laplace, **options).fit(problem.loader)
    fitted.save(tmp_path / "fit.safetensors")
    monkeypatch.setattr("estimators.training.retraining.train_map", None)
    loaded = RetrainedMixture(laplace, **options).load(tmp_path / "fit.safetensors")
    assert torch.equal(loaded.variance(problem.query), fitted.variance(problem.query))
    assert torch.equal(loaded.sample(problem.query, 5), fitted.sample(problem.query, 5))
    other = LastLayerLaplace(problem.model, "classification", prior_precision=2.6)
    with pytest.raises(StateError, match="prior_precision"):
        RetrainedMixture(other, **options).load(tmp_path / "fit.safetensors")


def test_another_option_of_the_method_keeps_the_networks(make_problem, monkeypatch):
    problem = make_problem("classification", network())
    laplace = LastLayerLaplace(problem.model, "classification", prior_precision=2.5)
    options = {"make_model": network, "recipe": SHORT, "n_members": 2}
    fitted = RetrainedMixture(laplace, **options).fit(problem.loader)
    with monkeypatch.context() as patch:
        patch.setattr("estimators.training.retraining.train_map", None)
        moved = fitted.clone_with(**{"estimator.prior_precision": 9.0})
    models = [member.model for member in fitted.members_]
    laplaces = [LastLayerLaplace(model, "classification", prior_precision=9.0) for model in models]
    expected = Mixture(laplaces).fit(problem.loader)
    assert torch.allclose(moved.variance(problem.query), expected.variance(problem.query), rtol=1e-9)
    assert moved.estimator.prior_precision == 9.0


def test_components_are_fitted_as_copies_and_seeds_follow(make_problem):
    problem = make_problem("regression")
    mean_absolute = RegVar(network(2), problem.likelihood, regularizer=MeanAbsolute(), solver=LinearResponse())
    mixture = Mixture([MAP(network(2, 1), problem.likelihood), mean_absolute]).fit(problem.loader)
    with pytest.raises(NotFittedError):
        mean_absolute.variance(problem.query)
    assert mixture.variance(problem.query).shape == (7, 2)
    assert mixture.weights_ == [0.5, 0.5]
    with pytest.raises(UnsupportedError, match="RegVar"):
        mixture.covariance(problem.query)
    swag = RetrainedMixture(
        SWAG(network(2), problem.likelihood, recipe=DESCENT, n_samples=3, seed=8),
        make_model=lambda: network(2, 4),
        recipe=SHORT,
        n_members=2,
    )
    assert [member.seed for member in swag.fit(problem.loader).members_] == [8, 9]


def test_a_component_whose_network_has_changed_is_named(make_problem):
    problem = make_problem("regression")
    models = [network(2, seed) for seed in range(2)]
    mixture = Mixture([MAP(model, problem.likelihood) for model in models]).fit(problem.loader)
    kept = copy.deepcopy(models[1].state_dict())
    with torch.no_grad():
        models[1][3].bias.add_(1.0)
    with pytest.raises(ModelChangedError, match="component 1"):
        mixture.variance(problem.query)
    models[1].load_state_dict(kept)
    assert mixture.variance(problem.query).shape == (7, 2)


@pytest.mark.parametrize(
    ("weights", "n", "counts"),
    [
        ([0.5, 0.5], 5, [3, 2]),
        ([0.1, 0.2, 0.7], 10, [1, 2, 7]),
        ([0.995, 0.005], 100, [99, 1]),
        ([0.004, 0.0, 0.99, 0.006], 3, [1, 0, 1, 1]),
    ],
)
def test_samples_are_apportioned_by_the_weights_with_one_for_each_component(weights, n, counts):
    assert _apportioned(weights, n) == counts


def test_bad_mixtures_are_rejected():
    one = MAP(network(2), Gaussian(0.6))
    with pytest.raises(OptionError, match="empty list"):
        Mixture([])
    with pytest.raises(OptionError, match="Sequential"):
        Mixture([one, network(2)])
    with pytest.raises(OptionError, match=r"one likelihood.*index 1"):
        Mixture([one, MAP(network(2), Gaussian(0.7))])
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], ["a", 1.0]):
        with pytest.raises(OptionError, match="weights, 2 numbers"):
            Mixture([one, one], weights=weights)
    with pytest.raises(OptionError, match="make_model"):
        RetrainedMixture(one, make_model=network(2), recipe=SHORT)
    with pytest.raises(OptionError, match="n_members >= 2"):
        RetrainedMixture(one, make_model=network, recipe=SHORT, n_members=1)
