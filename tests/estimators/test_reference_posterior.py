"""The reference posterior: its draws have the moments of exact posteriors, and it says when they have not."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from sampling_problems import (
    GROUPS,
    LOOSE,
    PRIOR_MEAN,
    Replications,
    binomial_half_width,
    network,
    objective_of,
    potential_of,
    queries,
    ranks_of,
    rows,
    short,
    z_rms,
)
from scipy import stats
from torch import nn
from torch.func import functional_call

from estimators import Bernoulli, Categorical, Gaussian, LinearizedLaplace, ReferencePosterior
from estimators.errors import NotConvergedWarning, OptionError, ReferenceNotReachedError, StateError
from estimators.persistence import checkpoint
from estimators.sampling import ConvergenceCriteria
from estimators.sampling.collapsed import CollapsedPotential, find_collapsible_layer
from estimators.sampling.convergence import bulk_ess
from estimators.sampling.diagnostics import (
    NoiseFloor,
    RowDiagnostics,
    diagnose_rows,
    gaussian_total_variation,
    joined,
)
from estimators.sampling.function_draws import FunctionDraws
from estimators.sampling.hmc import HMC
from estimators.sampling.potential import ChainGradient, training_batches

SIGMAS = torch.tensor([0.5, 0.8], dtype=torch.float64)


@cache
def short_fit(collapse="auto"):
    """A fit with seed 0, made once; tests only read it."""
    return short(collapse=collapse).fit(rows())


def sizes_of(draws):
    """Effective sample sizes of means and variances, of draws (K, S, Q)."""
    return bulk_ess(draws), bulk_ess((draws - draws.mean((0, 1))).square())


# The function that is sampled


@pytest.mark.parametrize("likelihood", [Gaussian(SIGMAS), Categorical(), Bernoulli()], ids=lambda given: given.kind)
def test_the_potential_is_the_objective_in_prior_standard_deviations(likelihood):
    loader = rows()
    if likelihood.kind == "classification":
        loader = [(x, (y[:, 0] > 0).long()) for x, y in loader]
    if likelihood.kind == "binary":
        loader = [(x, (y > 0).double()) for x, y in loader]
    posterior = short(likelihood=likelihood, prior_precision=GROUPS, prior_mean=PRIOR_MEAN)
    potential = potential_of(posterior, loader)
    z = torch.randn(5, potential.n_dims, dtype=torch.float64)
    gradient = ChainGradient(potential, z)
    assert gradient.route == "recorded"
    energy, slope = gradient(z)
    objective, prior = potential.objective, potential.objective.prior
    for some, u, g in zip(z, energy, slope, strict=True):
        theta = prior.mean + some / prior.precision.sqrt()
        assert float(u) == pytest.approx(float(objective.loss(theta)), rel=1e-12)
        expected = objective.gradient(theta) / prior.precision.sqrt()
        assert torch.allclose(g, expected, rtol=1e-9, atol=1e-11)


class Branching(nn.Module):
    """A forward that branches on its weights, which neither vmap nor a recording can follow."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return x[:, :1] * (self.w if self.w > 0 else 3 * self.w)


def test_a_network_that_cannot_be_vectorised_is_sampled_one_chain_at_a_time():
    loader = [(x, y[:, :1]) for x, y in rows()]
    potential = potential_of(short(Branching()), loader)
    z = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    gradient = ChainGradient(potential, z)
    assert gradient.route == "one by one"
    x, y = (torch.cat(part) for part in zip(*loader, strict=True))
    for some, slope in zip(z, gradient(z)[1], strict=True):
        w = some / math.sqrt(2.3)
        factor = 1.0 if float(w) > 0 else 3.0
        residual = x[:, :1] * factor * w - y
        expected = ((residual * factor * x[:, :1]).sum() / 0.36 + 2.3 * w) / math.sqrt(2.3)
        assert torch.allclose(slope, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("sigma", "delta"), [(0.6, 2.3), (SIGMAS, 2.3), (0.6, {"2.bias": 0.4, **GROUPS})], ids=["shared", "σ", "δ"]
)
def test_the_collapsed_potential_is_the_marginal_likelihood_of_the_other_weights(sigma, delta):
    """Derived a second time in the space of rows: y_c ~ N(Φ m_c, Φ D_c⁻¹ Φᵀ + σ_c² I)."""
    model, loader = network(), rows()
    posterior = short(model, Gaussian(sigma), prior_precision=delta, prior_mean=PRIOR_MEAN)
    objective = objective_of(posterior, loader)
    batches = training_batches(objective)
    layer = find_collapsible_layer(objective, batches, "auto")
    potential = CollapsedPotential(objective, batches, layer)
    assert potential._n_factors == (1 if isinstance(sigma, float) else 2)
    z = torch.randn(3, potential.n_dims, dtype=torch.float64)
    x, y = batches[0].x, batches[0].y
    weights, mean, precision = objective.network.subset, objective.prior.mean, objective.prior.precision
    of_mean, of_precision = weights.unflatten(mean), weights.unflatten(precision)
    sigmas = torch.as_tensor(sigma, dtype=torch.float64).expand(2)

    def expected(z):
        w = of_mean["0.weight"] + z[:6].view(3, 2) / of_precision["0.weight"].sqrt()
        b = of_mean["0.bias"] + z[6:] / of_precision["0.bias"].sqrt()
        phi = torch.cat([(x @ w.T + b).tanh(), x.new_ones(len(x), 1)], dim=1)
        total = 0.5 * z.square().sum()
        for c in range(2):
            m = torch.cat([of_mean["2.weight"][c], of_mean["2.bias"][c : c + 1]])
            d = torch.cat([of_precision["2.weight"][c], of_precision["2.bias"][c : c + 1]])
            k = phi @ torch.diag(1 / d) @ phi.T + sigmas[c] ** 2 * torch.eye(len(x), dtype=x.dtype)
            total = total - torch.distributions.MultivariateNormal(phi @ m, k).log_prob(y[:, c])
        return total

    gradient = ChainGradient(potential, z)
    energy, slope = gradient(z)
    for some, u, g in zip(z, energy, slope, strict=True):
        leaf = some.clone().requires_grad_()
        value = expected(leaf)
        assert float(u) == pytest.approx(float(value.detach()), rel=1e-11)
        assert torch.allclose(g, torch.autograd.grad(value, leaf)[0], rtol=1e-8, atol=1e-9)


def test_a_frozen_bias_of_the_last_layer_is_not_integrated_out():
    model = network()
    model[2].bias.requires_grad_(False)
    objective = objective_of(short(model), rows())
    batches = training_batches(objective)
    layer = find_collapsible_layer(objective, batches, "last_layer")
    potential = CollapsedPotential(objective, batches, layer)
    z = torch.randn(potential.n_dims, dtype=torch.float64)
    conditional = potential.conditional(z[None])
    theta = potential.joined(z[None], conditional, torch.Generator().manual_seed(0))[0]
    x, y = batches[0].x, batches[0].y
    features = (x @ theta[:6].view(3, 2).T + theta[6:9]).tanh()
    precision = features.T @ features / 0.36 + 2.3 * torch.eye(3, dtype=x.dtype)
    expected = torch.linalg.solve(precision, features.T @ (y - model[2].bias.detach()) / 0.36)
    assert torch.allclose(conditional.mean[0], expected.T, rtol=1e-9)
    factor = conditional.factor[0, 0]
    assert torch.allclose(factor @ factor.T, precision, rtol=1e-9)


# The chains


def gaussian(precision):
    return lambda z: (0.5 * torch.einsum("kd,de,ke->k", z, precision, z), z @ precision)


def test_hmc_has_the_moments_of_a_gaussian():
    factor = torch.randn(4, 4, dtype=torch.float64)
    precision = factor @ factor.T + torch.eye(4, dtype=torch.float64)
    hmc = HMC(gaussian(precision), torch.randn(200, 4, dtype=torch.float64), torch.Generator().manual_seed(0))
    hmc.begin()
    for _ in range(60):
        hmc.warm_up()
    hmc.end_warm_up()
    moves = [hmc.move() for _ in range(1)]
    draws = []
    for _ in range(60):
        moves.append(hmc.move())
        draws.append(hmc.z)
    draws = torch.stack(draws, dim=1)
    covariance = torch.linalg.inv(precision)
    exact = (torch.zeros(4, dtype=torch.float64), covariance.diagonal())
    found = (draws.mean((0, 1)), draws.flatten(0, 1).var(0))
    assert z_rms(found, exact, sizes_of(draws), (math.inf, math.inf)) < 1.6
    acceptance = float(torch.stack([done.acceptance for done in moves]).mean())
    assert 0.65 < acceptance < 0.95
    assert not any(bool(done.divergent.any()) for done in moves)


def test_a_trajectory_conserves_the_energy_to_second_order_and_goes_back():
    hmc = HMC(gaussian(torch.eye(3, dtype=torch.float64)), torch.randn(5, 3).double(), torch.Generator().manual_seed(0))
    hmc.begin()
    momentum, errors = torch.randn(5, 3, dtype=torch.float64), []
    start = hmc.energy + 0.5 * momentum.square().sum(1)
    for step in (0.1, 0.05):
        z, energy, _, moved = hmc._leapfrog(momentum, step, round(1 / step))
        errors.append(float((energy + 0.5 * moved.square().sum(1) - start).abs().mean()))
        back = HMC(hmc.gradient, z, hmc.generator)
        back.begin()
        assert torch.allclose(back._leapfrog(-moved, step, round(1 / step))[0], hmc.z, atol=1e-12)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("likelihood", [Gaussian(0.6), Categorical()], ids=lambda given: given.kind)
def test_ranks_of_simulated_parameters_are_uniform(likelihood):
    """Simulation-based calibration of 150 data sets, each with a chain of its own, and coverage at 90 %."""
    x, x_star = queries(8, seed=1), queries(3, seed=2)
    simulated = Replications(network(), likelihood, x, n=150, delta=1.7)
    hmc = HMC(simulated, simulated.starts, torch.Generator().manual_seed(3))
    hmc.begin()
    for _ in range(60):
        hmc.warm_up()
    hmc.end_warm_up()
    kept = []
    for t in range(4 * 63):
        hmc.move()
        if t % 4 == 3:
            kept.append(simulated.outputs(hmc.z, x_star).flatten(1))
    ranks = ranks_of(simulated.outputs(simulated.truth, x_star).flatten(1), torch.stack(kept))
    for column in ranks.T:
        assert stats.kstest(column, "uniform").pvalue > 0.01
    covered = ((ranks > 0.05) & (ranks < 0.95)).mean()
    assert abs(covered - 0.9) < binomial_half_width(150)


def test_a_chain_that_starts_where_curvature_is_large_gets_a_step_size_of_its_own():
    """One chain starts in a narrow minimum, ten thousand times as curved as the wide one of the others."""
    centres = torch.tensor([[0.0], [0.0], [0.0], [40.0]], dtype=torch.float64)

    def gradient(z):
        stiff = torch.where(z > 30, 1e4 * (z - 40), 0.05 * z)
        value = torch.where(z > 30, 5e3 * (z - 40).square(), 0.025 * z.square())
        return value.sum(1), stiff

    hmc = HMC(gradient, centres + 0.01, torch.Generator().manual_seed(0))
    hmc.begin()
    for _ in range(30):
        hmc.warm_up()
    sizes = hmc.step_sizes
    assert sizes[3] < 0.1 < min(sizes[:3])
    before = hmc.z[3].clone()
    hmc.warm_up()
    assert float(hmc.z[3]) != float(before) or hmc.step_sizes[3] < sizes[3]
    hmc.share_step_size()
    assert len(set(hmc.step_sizes)) == 1


# Moments and predictions


@pytest.fixture(scope="module")
def linear():
    model = nn.Linear(2, 2).double()
    options = {"prior_precision": {"bias": 0.9, "*": 3.1}, "prior_mean": {"weight": 0.4, "*": -0.3}}
    return short(model, Gaussian(SIGMAS), n_chains=16, n_draws=4000, **options).fit(rows())


def test_a_linear_model_has_its_exact_posterior_within_monte_carlo_error(linear):
    x = torch.cat([x for x, _ in rows()])
    y = torch.cat([y for _, y in rows()])
    phi = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    mean = []
    variance = []
    for c in range(2):
        delta, m = torch.tensor([3.1, 3.1, 0.9]).double(), torch.tensor([0.4, 0.4, -0.3]).double()
        precision = phi.T @ phi / SIGMAS[c] ** 2 + torch.diag(delta)
        mean.append(torch.linalg.solve(precision, phi.T @ y[:, c] / SIGMAS[c] ** 2 + delta * m))
        variance.append(torch.linalg.inv(precision).diagonal())
    order = [0, 1, 3, 4, 2, 5]  # θ has the weights of both outputs, then the biases
    exact = tuple(torch.cat(part)[order] for part in (mean, variance))
    draws = linear.weight_draws_.weights
    found = (draws.mean((0, 1)), draws.flatten(0, 1).var(0))
    z = z_rms(found, exact, sizes_of(draws), (math.inf, math.inf))
    assert 0.3 < z < 1.6
    assert not linear.collapsed_  # there would be nothing left to sample


def z_scores(posterior, x):
    """z-scores of means and variances at x against linearized Laplace, which is exact here, (2, M, C)."""
    exact = LinearizedLaplace(
        posterior.model,
        posterior.likelihood,
        prior_precision=posterior.prior_precision,
        prior_mean=posterior.prior_mean,
    ).fit(rows())
    draws = posterior.weight_draws_.at(x).f.flatten(2)
    of_mean, of_squares = (size.view(len(x), -1) for size in sizes_of(draws))
    variance = exact.variance(x)
    # θ̂ of this network is not its minimum: the exact mean is one Newton step from it
    step = torch.linalg.solve(exact.posterior_precision(), exact.objective_.gradient(exact.theta_))
    mean = posterior.model(x).detach() - torch.einsum("mcp,p->mc", exact.jacobians(x)[0], step)
    of_means = (posterior.predict(x).mean - mean) / (variance / of_mean).sqrt()
    return torch.stack([of_means, (posterior.variance(x) - variance) / (variance * (2 / of_squares).sqrt())])


def test_a_linear_model_has_the_variance_of_exact_laplace_within_monte_carlo_error(linear):
    z = z_scores(linear, queries())
    assert 0.2 < float(z.square().mean().sqrt()) < 1.6  # rows share 3 weights per output


@pytest.mark.verification
def test_the_z_scores_of_independent_samplers_are_standard_normal():
    """One mean and one variance at one random row and output for each of 60 seeds.

    In short runs the chains that are accepted agree by chance, and vary less than their distance from the posterior.
    """
    options = {"prior_precision": {"bias": 0.9, "*": 3.1}, "prior_mean": {"weight": 0.4, "*": -0.3}}
    x, chosen, long = queries(), np.random.default_rng(0), replace(LOOSE, min_bulk_ess=1200)
    scores = []
    for seed in range(60):
        posterior = short(
            nn.Linear(2, 2).double(), Gaussian(SIGMAS), n_chains=16, n_draws=4000, seed=seed, criteria=long, **options
        )
        z = z_scores(posterior.fit(rows()), x)
        scores.append(z[:, chosen.integers(len(x)), chosen.integers(2)])
    for z in torch.stack(scores).T.numpy():
        assert stats.kstest(z, "norm").pvalue > 0.01
        assert np.sqrt(np.mean(z**2)) == pytest.approx(1, abs=3 / math.sqrt(2 * 60))
        print("z-scores: RMS", np.sqrt(np.mean(z**2)), "mean", z.mean(), "KS p", stats.kstest(z, "norm").pvalue)


@pytest.fixture(scope="module")
def both():
    """The collapsed and the full sampler on one network."""
    options = {"prior_precision": GROUPS, "prior_mean": PRIOR_MEAN, "n_chains": 16, "n_draws": 4000}
    strict = replace(LOOSE, max_r_hat=1.02, min_bulk_ess=600)
    made = [short(likelihood=Gaussian(SIGMAS), collapse=c, criteria=strict, **options) for c in ("auto", None)]
    return [posterior.fit(rows()) for posterior in made]


def test_the_collapsed_and_the_full_sampler_agree(both):
    assert [posterior.collapsed_ for posterior in both] == [True, False]
    x, moments, sizes = queries(), [], []
    for posterior in both:
        draws = posterior.weight_draws_.at(x).f.flatten(2)
        moments.append((draws.mean((0, 1)), draws.flatten(0, 1).var(0)))
        sizes.append(sizes_of(draws))
    assert z_rms(*moments, *sizes) < 1.3
    rao_blackwell = (both[0].predict(x).mean.flatten(), both[0].variance(x).flatten())
    assert z_rms(rao_blackwell, moments[1], *sizes) < 1.3  # at most as far


def test_the_variance_is_the_diagonal_of_every_covariance(both):
    x = queries()
    for posterior in both:
        variance, covariance = posterior.variance(x), posterior.covariance(x)
        joint = posterior.joint_covariance(x)
        assert torch.allclose(covariance.diagonal(dim1=1, dim2=2), variance, rtol=1e-10)
        blocks = torch.stack([joint[i, :, i] for i in range(len(x))])
        assert torch.allclose(blocks, covariance, rtol=1e-9, atol=1e-12)
        assert float(torch.linalg.eigvalsh(joint.reshape(12, 12)).min()) > -1e-10
        assert torch.allclose(torch.cat([posterior.variance(row) for row in x.split(1)]), variance, rtol=1e-10)


def test_rao_blackwellised_moments_are_the_average_over_conditional_regressions(both):
    """Each draw's regression on its features is solved anew, in plain loops."""
    posterior, x = both[0], queries()
    data = [torch.cat(part) for part in zip(*rows(), strict=True)]
    subset, prior = posterior.network_.subset, posterior.objective_.prior
    d, m = subset.unflatten(prior.precision), subset.unflatten(prior.mean)
    means, variances = [], []
    for theta in posterior.weight_draws_.weights.flatten(0, 1)[::7]:
        w = subset.unflatten(theta)
        phi, star = (
            torch.cat([(part @ w["0.weight"].T + w["0.bias"]).tanh(), part.new_ones(len(part), 1)], 1)
            for part in (data[0], x)
        )
        of_c = []
        for c in range(2):
            delta = torch.cat([d["2.weight"][c], d["2.bias"][c : c + 1]])
            mean = torch.cat([m["2.weight"][c], m["2.bias"][c : c + 1]])
            inverse = torch.linalg.inv(phi.T @ phi / SIGMAS[c] ** 2 + torch.diag(delta))
            v = inverse @ (phi.T @ data[1][:, c] / SIGMAS[c] ** 2 + delta * mean)
            of_c.append((star @ v, (star @ inverse * star).sum(1)))
        means.append(torch.stack([part[0] for part in of_c], 1))
        variances.append(torch.stack([part[1] for part in of_c], 1))
    found = posterior.weight_draws_.at(x)
    every = slice(None, None, 7)
    assert torch.allclose(found.conditional_mean.flatten(0, 1)[every], torch.stack(means), rtol=1e-7, atol=1e-9)
    whitened = found.whitened.square().sum(3).flatten(0, 1)[every]
    assert torch.allclose(whitened.mT, torch.stack(variances), rtol=1e-7)
    total = found.conditional_mean.flatten(0, 1).var(0) + found.whitened.square().sum(3).mean((0, 1)).mT
    assert torch.allclose(posterior.variance(x), total, rtol=1e-12)


@pytest.fixture(scope="module")
def classifier():
    loader = [(x, (x.sum(1) + y[:, 0] > 0).long()) for x, y in rows()]
    return short(network(outputs=3), "classification").fit(loader)


def test_probabilities_are_the_average_over_the_draws(classifier):
    x, model = queries(), classifier.model
    probs = torch.zeros(len(x), 3, dtype=torch.float64)
    weights = classifier.weight_draws_.weights.flatten(0, 1)
    for theta in weights:
        probs += functional_call(model, classifier.weights_to_state_dict(theta), (x,)).softmax(-1).detach()
    prediction = classifier.predict(x)
    assert torch.allclose(prediction.probs, probs / len(weights), rtol=1e-10)
    assert torch.allclose(prediction.log_probs.exp(), prediction.probs)
    assert torch.allclose(prediction.mean, classifier.draws(x).mean(0))
    assert torch.allclose(prediction.epistemic_variance, classifier.draws(x).var(0))
    assert prediction.samples.shape[0] <= 1000
    probit = classifier.predict(x, link_approx="probit").probs
    assert 1e-4 < float((probit - prediction.probs).abs().max()) < 0.2


def test_samples_are_the_network_at_samples_of_the_weights(classifier):
    x = queries()
    expected = torch.stack(
        [
            functional_call(classifier.model, classifier.weights_to_state_dict(theta), (x,)).detach()
            for theta in classifier.sample_weights(5, seed=2)
        ]
    )
    assert torch.allclose(classifier.sample(x, 5, seed=2), expected, rtol=1e-10)


def test_a_prediction_in_parts_is_that_of_all_rows(classifier, monkeypatch):
    x = queries()
    whole, floor = classifier.predict(x), classifier.noise_floor(x)
    monkeypatch.setattr("estimators.sampling.function_draws.rows_per_chunk", lambda _: 4)
    parts = classifier.predict(x)
    assert torch.allclose(parts.probs, whole.probs)
    assert parts.samples.shape == whole.samples.shape
    in_parts = classifier.noise_floor(x)
    assert in_parts.variance == pytest.approx(floor.variance)
    assert in_parts.total_variation == pytest.approx(floor.total_variation)
    assert in_parts.w2 == pytest.approx(floor.w2)


# Diagnostics


def test_the_noise_floor_is_half_of_the_distance_between_even_and_odd_chains(classifier):
    x = queries()
    f = classifier.weight_draws_.at(x).f
    halves = [f[i::2].flatten(0, 1) for i in range(2)]
    probs = [half.softmax(-1).mean(0) for half in halves]
    variances = [half.var(0) for half in halves]
    floor = classifier.noise_floor(x)
    assert floor.total_variation == pytest.approx(float(0.25 * (probs[0] - probs[1]).abs().sum(1).mean()), rel=1e-6)
    relative = (variances[0] - variances[1]) / (variances[0] + variances[1]) * 2
    assert floor.variance == pytest.approx(0.5 * float(relative.square().mean().sqrt()), rel=1e-6)
    w2 = [
        math.sqrt(np.mean((np.sort(a.numpy()) - np.sort(b.numpy())) ** 2))
        for a, b in zip(*(half.flatten(1).T for half in halves), strict=True)
    ]
    assert floor.w2 == pytest.approx(0.5 * np.mean(w2), rel=1e-6)


def test_the_total_variation_of_gaussians_is_the_integral():
    cases = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 1], [0, 1, 0.3, 2], [2, 0.5, -1, 3], [0, 1, 1e-9, 1], [0, 1, 0, 1.1]])
    y = np.linspace(-40, 40, 400_001)
    for m, v, n, w in cases.double().tolist():
        p, q = stats.norm.pdf(y, m, v**0.5), stats.norm.pdf(y, n, w**0.5)
        found = gaussian_total_variation(*(torch.tensor(part) for part in (m, v, n, w)))
        assert float(found) == pytest.approx(0.5 * np.abs(p - q).sum() * (y[1] - y[0]), abs=2e-7)


def stuck(shift):
    """Draws of chains that agree at row 0, and of which half are stuck elsewhere at row 1."""
    f = torch.randn(8, 500, 2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f[:4, :, 1] += shift
    return FunctionDraws(f)


def test_chains_that_are_stuck_apart_are_seen():
    good, bad = (diagnose_rows(stuck(shift), Gaussian(0.5), torch.Size([1])) for shift in (0.0, 3.0))
    assert good.r_hat < 1.01 < 1.5 < bad.r_hat
    assert bad.bulk_ess < 20 < 1000 < good.bulk_ess


class TwoModes(nn.Module):
    """f = w² at x = 0 and w at x = 1: the sign of w is not determined by data at x = 0."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))

    def forward(self, x):
        return self.w.square() * (1 - x) + self.w * x


def two_modes(**options):
    loader = [(torch.zeros(5, 1).double(), torch.full((5, 1), 4.0).double())]
    return short(TwoModes(), Gaussian(0.5), prior_precision=0.5, **options), loader


def test_a_query_at_which_chains_disagree_raises():
    posterior, loader = two_modes()
    posterior.fit(loader)
    assert posterior.reached_
    elsewhere = torch.ones(1, 1).double()
    for query in (posterior.variance, posterior.predict, posterior.covariance, lambda x: posterior.sample(x, 3)):
        with pytest.raises(ReferenceNotReachedError, match=r"R-hat.*check_rows"):
            query(elsewhere)
    assert posterior.diagnose(elsewhere).rows.r_hat > 1.5


def test_check_rows_make_the_fit_raise_or_warn():
    elsewhere = torch.ones(1, 1).double()
    posterior, loader = two_modes(check_rows=elsewhere, max_gradients=30_000)
    with pytest.raises(ReferenceNotReachedError, match=r"check rows\. Received R-hat .* gradients"):
        posterior.fit(loader)
    accepted, _ = two_modes(check_rows=elsewhere, max_gradients=30_000, accept_unconverged=True)
    with pytest.warns(NotConvergedWarning, match="accept_unconverged"):
        accepted.fit(loader)
    assert not accepted.reached_
    assert accepted.diagnostics_.failures(LOOSE)
    with pytest.warns(NotConvergedWarning, match="query"):
        assert float(accepted.variance(elsewhere)) > 1


def test_sampling_ends_when_rows_unlike_the_data_are_reached_too():
    far = 4 + queries(7)
    by_training_rows = short_fit()
    limit = by_training_rows.noise_floor(far).total_variation / 2
    criteria = replace(LOOSE, max_query_total_variation=limit)
    found = short(criteria=criteria, ood_check_rows=[far]).fit(rows())
    assert found.noise_floor(far).total_variation <= limit
    assert found.diagnostics_.n_gradients > by_training_rows.diagnostics_.n_gradients


def test_rows_are_judged_once_and_anew_after_another_fit(monkeypatch):
    judged = []

    def counted(draws, *rest):
        judged.append(draws.f.shape[2])
        return diagnose_rows(draws, *rest)

    posterior, x = short().fit(rows()), queries(3)
    monkeypatch.setattr("estimators.sampling.reference.diagnose_rows", counted)
    first = posterior.diagnose(x)
    posterior.variance(x), posterior.predict(x), posterior.sample(x, 2), posterior.joint_covariance(x)
    assert judged == [3]
    posterior.variance(queries(4))
    assert judged == [3, 4]
    posterior.seed = 1
    assert posterior.fit(rows()).diagnose(x).rows != first.rows


def test_parts_of_the_rows_are_judged_by_the_worst_and_compared_in_the_mean():
    parts = [
        RowDiagnostics(1.02, 900.0, 2000.0, NoiseFloor(0.3, 0.01, 0.5), 3),
        RowDiagnostics(1.004, 3000.0, 500.0, NoiseFloor(0.1, 0.04, 0.2), 1),
    ]
    found = joined(parts)
    assert (found.r_hat, found.bulk_ess, found.squares_ess, found.n_rows) == (1.02, 900.0, 500.0, 4)
    assert found.noise_floor.variance == pytest.approx(math.sqrt((3 * 0.3**2 + 0.1**2) / 4))
    assert found.noise_floor.total_variation == pytest.approx((3 * 0.01 + 0.04) / 4)
    assert found.noise_floor.w2 == pytest.approx((3 * 0.5 + 0.2) / 4)
    failures = replace(short_fit().diagnostics_, rows=joined([parts[0], replace(parts[1], bulk_ess=math.nan)])).failures
    assert any("bulk ESS nan" in text for text in failures(LOOSE))


def test_a_budget_that_cannot_suffice_raises_before_it_is_spent():
    for gradients, says in ((100, "starts and warm-up"), (1500, "max_gradients")):
        with pytest.raises(ReferenceNotReachedError, match=says):
            short(max_gradients=gradients).fit(rows())


def test_criteria_are_named_when_they_are_missed(classifier):
    diagnostics = classifier.diagnostics_
    strict = ConvergenceCriteria(
        max_r_hat=1.0, min_bulk_ess=1e9, min_squares_ess=1e9, max_total_variation=0, min_acceptance=0.999
    )
    failures = " ".join(replace(diagnostics, divergences=2).failures(strict))
    for name in ("R-hat", "bulk ESS", "of squares", "total variation", "2 divergences", "acceptance"):
        assert name in failures
    rows = replace(diagnostics.rows, r_hat=math.nan)
    assert any("R-hat" in text for text in replace(diagnostics, rows=rows).failures(LOOSE))


# Options, state


def test_two_starts_and_dtypes_agree():
    x = queries()
    made = [short(starts="trained", seed=1), short(starts="both", seed=2, dtype=torch.float32)]
    first, other = (posterior.fit(rows()) for posterior in made)
    assert other.weight_draws_.weights.dtype == torch.float32
    assert other.variance(x).dtype == torch.float64  # that of the model
    assert torch.allclose(first.variance(x), other.variance(x), rtol=0.25)
    assert torch.allclose(first.predict(x).mean, other.predict(x).mean, atol=0.15)


def test_the_model_may_be_in_float32():
    model = network().float()
    posterior = short(model).fit(rows(dtype=torch.float32))
    assert posterior.weight_draws_.weights.dtype == torch.float64
    assert posterior.variance(queries().float()).dtype == torch.float32


def test_the_same_seed_gives_the_same_draws_and_another_one_others():
    first, again, other = short_fit(), short(seed=0).fit(rows()), short(seed=4).fit(rows())
    assert torch.equal(first.weight_draws_.weights, again.weight_draws_.weights)
    assert not torch.equal(first.weight_draws_.weights[:, :10], other.weight_draws_.weights[:, :10])


def test_the_budget_of_draws_is_kept():
    strict = replace(LOOSE, min_bulk_ess=1500)
    posterior = short(n_draws=400, criteria=strict, accept_unconverged=True, max_gradients=20_000)
    with pytest.warns(NotConvergedWarning):
        posterior.fit(rows())
    assert 200 <= len(posterior.weight_draws_) <= 400


@pytest.mark.parametrize("collapse", ["auto", None])
def test_a_killed_fit_continues_with_the_same_numbers(collapse, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SECONDS", 0.0)
    path, made = tmp_path / "fit", short(collapse=collapse)
    whole = short_fit(collapse)
    for stop in (40, 35):  # moves in the warm-up, and more until it samples
        moves, move = [], HMC.move

        def interrupted(hmc, moves=moves, move=move, stop=stop):
            moves.append(1)
            if len(moves) > stop:
                raise KeyboardInterrupt
            return move(hmc)

        with monkeypatch.context() as patched:
            patched.setattr(HMC, "move", interrupted)
            with pytest.raises(KeyboardInterrupt):
                made.fit(rows(), checkpoint=path)
        with pytest.raises(StateError, match="finished fit"):
            made.load(path)
    resumed = made.fit(rows(), checkpoint=path)
    assert torch.equal(resumed.weight_draws_.weights, whole.weight_draws_.weights)
    assert resumed.diagnostics_ == replace(whole.diagnostics_, n_gradients=resumed.diagnostics_.n_gradients)
    assert resumed.diagnostics_.n_gradients == whole.diagnostics_.n_gradients
    loaded = short(collapse=collapse).load(path)
    assert torch.equal(loaded.variance(queries()), whole.variance(queries()))
    assert loaded.diagnostics_ == resumed.diagnostics_
    assert loaded.collapsed_ == whole.collapsed_


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_chains", 5),
        ("n_chains", 2),
        ("n_draws", 0),
        ("check_rows", 3.7),
        ("ood_check_rows", torch.ones(2, 1)),
        ("ood_check_rows", [None]),
        ("starts", "modes"),
        ("collapse", True),
        ("max_gradients", 0),
        ("criteria", 1.01),
        ("accept_unconverged", 1),
        ("dtype", torch.float16),
        ("dtype", "float64"),
        ("engine", "nuts"),
        ("seed", 0.5),
    ],
)
def test_bad_options_raise_at_once(option, value):
    with pytest.raises(OptionError, match=option):
        ReferencePosterior(network(), "regression", **{option: value})


@pytest.mark.parametrize("name", ["max_r_hat", "min_bulk_ess", "max_divergences"])
def test_bad_criteria_raise_at_once(name):
    with pytest.raises(OptionError, match=name):
        ConvergenceCriteria(**{name: -1.0})


def test_what_cannot_be_sampled_raises():
    with pytest.raises(OptionError, match="n_draws >= 64, 8 for each of 8 chains"):
        short(n_draws=63).fit(rows())
    with pytest.raises(OptionError, match="prior_precision > 0 for every weight"):
        short(prior_precision={"*bias": 0.0, "*": 1.0}).fit(rows())
    labels = [(x, (y[:, 0] > 0).long()) for x, y in rows()]
    with pytest.raises(OptionError, match=re.escape('collapse="last_layer"')):
        short(likelihood="classification", collapse="last_layer").fit(labels)
    with pytest.raises(OptionError, match="weights outside the last layer"):
        short(nn.Linear(2, 2).double(), collapse="last_layer").fit(rows())
    bent = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()
    with pytest.raises(OptionError, match=r"ends in nn\.Linear"):
        short(bent, collapse="last_layer").fit(rows())
    assert not short(bent).fit(rows()).collapsed_


def nuts_of(*arguments, **options):
    """A fit by the sampler of nutpie with a fourth of the usual chains, since it samples one after another."""
    pytest.importorskip("nutpie", reason='needs the extra: pip install "bdl-bench[reference]"')
    criteria = replace(LOOSE, max_r_hat=1.05)
    return short(*arguments, engine="nutpie", n_draws=600, criteria=criteria, n_chains=4, seed=7, **options).fit(rows())


def test_nuts_is_another_engine_whose_draws_have_the_exact_moments_of_a_linear_model(linear):
    nuts = nuts_of(linear.model, Gaussian(SIGMAS), prior_precision=linear.prior_precision, prior_mean=linear.prior_mean)
    assert 0.2 < float(z_scores(nuts, queries()).square().mean().sqrt()) < 1.6


def test_nuts_stops_at_the_budget_of_gradients():
    pytest.importorskip("nutpie", reason='needs the extra: pip install "bdl-bench[reference]"')
    with pytest.raises(ReferenceNotReachedError, match="max_gradients"):
        short(engine="nutpie", n_chains=4, max_gradients=2500, starts="prior").fit(rows())


SPENT_BUDGET = """
import torch
from estimators.errors import ReferenceNotReachedError
from estimators.sampling.nuts import sample_nuts
try:
    starts = torch.ones(4, 17).double()
    sample_nuts(lambda z: (z.square().sum(-1) / 2, z), starts, 2000, max_gradients=1000, seed=0, progress_bar=False)
except ReferenceNotReachedError:
    print("spent")
"""


def test_no_thread_of_nuts_outlives_a_spent_budget():
    """Threads that did ended the process by a segmentation fault."""
    pytest.importorskip("nutpie", reason='needs the extra: pip install "bdl-bench[reference]"')
    done = subprocess.run([sys.executable, "-c", SPENT_BUDGET], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), "panicked" in done.stderr) == (0, "spent", False), done.stderr


@pytest.mark.verification
def test_nuts_is_another_engine_with_the_same_posterior(both):
    options = {"prior_precision": GROUPS, "prior_mean": PRIOR_MEAN, "collapse": None}
    nuts = nuts_of(likelihood=Gaussian(SIGMAS), **options)
    x, moments, sizes = queries(), [], []
    for posterior in (both[1], nuts):
        draws = posterior.weight_draws_.at(x).f.flatten(2)
        moments.append((draws.mean((0, 1)), draws.flatten(0, 1).var(0)))
        sizes.append(sizes_of(draws))
    assert z_rms(*moments, *sizes) < 1.4
