"""The posterior over weights: samples, matrices, Jacobians, joint covariances and independent outputs."""

import copy
import doctest
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from weight_space_fits import EXACT, GENERAL, LAPLACE, REGVAR, close, kinds, posteriors

from estimators import (
    Categorical,
    Gaussian,
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    PosteriorDraws,
    RegVar,
)
from estimators.baselines import MAP, DeepEnsemble, SubnetworkLaplace
from estimators.errors import DataError, ModelChangedError, ModelError, NotFittedError, TooLargeError, UnsupportedError
from estimators.estimator import weight_space
from estimators.runtime import memory

structures = pytest.mark.parametrize("name", LAPLACE)


# Matrices


@kinds
@pytest.mark.parametrize("name", EXACT)
def test_precision_and_covariance_of_an_exact_posterior_are_dense_autograds(name, kind, posterior_fit, by_hand):
    laplace, problem = posterior_fit(name, kind)
    delta = laplace.objective_.prior.precision
    expected = by_hand(problem).precision(EXACT[name], delta)
    close(laplace.posterior_precision(), expected)
    close(laplace.posterior_covariance(), torch.linalg.inv(expected))
    close(laplace.posterior_variance(), torch.linalg.inv(expected).diagonal())


def over_all_weights(laplace, covariance):
    """The covariance (P, P), which is 0 for the fixed weights of a subnetwork."""
    index = getattr(laplace, "index_", torch.arange(len(laplace.theta_)))
    whole = torch.zeros(len(laplace.theta_), len(laplace.theta_), dtype=covariance.dtype)
    whole[index[:, None], index] = covariance
    return whole


@structures
def test_the_covariance_is_the_inverse_of_the_precision_and_its_diagonal_the_variance(name, posterior_fit):
    laplace, _ = posterior_fit(name)
    precision, covariance = laplace.posterior_precision(), laplace.posterior_covariance()
    assert len(covariance) == (11 if name == "subnetwork" else len(laplace.theta_))
    close(precision @ covariance, torch.eye(len(covariance), dtype=covariance.dtype), rtol=1e-8)
    close(laplace.posterior_variance(), over_all_weights(laplace, covariance).diagonal(), rtol=1e-9)
    assert torch.linalg.eigvalsh(covariance)[0] > 0


@structures
def test_the_covariance_over_weights_gives_that_of_the_outputs(name, posterior_fit):
    laplace, problem = posterior_fit(name)
    jacobian, f = laplace.jacobians(problem.query)
    covariance = over_all_weights(laplace, laplace.posterior_covariance())
    close(laplace.covariance(problem.query), jacobian @ covariance @ jacobian.transpose(1, 2))
    close(f, problem.model(problem.query).detach(), rtol=1e-12)
    joint = torch.einsum("mcp,pq,ndq->mcnd", jacobian, covariance, jacobian)
    close(laplace.joint_covariance(problem.query), joint)


def test_factors_of_many_weights_agree_with_the_dense_form(make_problem):
    """Above 500 weights the dual form stores its rows in factors."""
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 15), nn.Tanh(), nn.Linear(15, 3))
    problem = make_problem("classification", model)
    dense, dual = (
        LinearizedLaplace(problem.model, problem.likelihood, prior_precision={"0.*": 0.7, "*": 1.9}, inverse=inverse)
        for inverse in ("cholesky", "dual")
    )
    dense.fit(problem.loader)
    dual.fit(problem.loader)
    assert type(dual.precision_).__name__ == "FactoredDual"
    close(dual.posterior_precision(), dense.posterior_precision())
    close(dual.posterior_covariance(), dense.posterior_covariance())
    close(dual.posterior_variance(), dense.posterior_variance())
    close(dual.joint_covariance(problem.query), dense.joint_covariance(problem.query))


def test_kron_with_fewer_rows_than_inputs_has_the_prior_outside_of_their_span(make_problem):
    problem = make_problem("classification", nn.Sequential(nn.Linear(30, 5), nn.Tanh(), nn.Linear(5, 3)), (30,), n=7)
    laplace = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=1.9, hessian_structure="kron").fit(
        problem.loader
    )
    assert laplace.precision_.blocks["0.weight"].outside is not None
    covariance = laplace.posterior_covariance()
    close(laplace.posterior_variance(), covariance.diagonal(), rtol=1e-9)
    close(laplace.posterior_precision() @ covariance, torch.eye(len(covariance)).double(), rtol=1e-8)
    jacobian, _ = laplace.jacobians(problem.query)
    joint = torch.einsum("mcp,pq,ndq->mcnd", jacobian, covariance, jacobian)
    close(laplace.joint_covariance(problem.query), joint, rtol=1e-9)


@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_the_joint_covariance_of_convolutions_is_that_of_their_dense_posterior(structure, make_problem):
    """Weights that are used at many positions, beside parameters without factors."""
    layers = nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2)
    problem = make_problem("classification", nn.Sequential(*layers), (2, 5, 5), n=11)
    options = {"prior_precision": {"0.*": 0.4, "*": 1.9}, "hessian_structure": structure}
    laplace = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
    jacobian, _ = laplace.jacobians(problem.query)
    joint = torch.einsum("mcp,pq,ndq->mcnd", jacobian, laplace.posterior_covariance(), jacobian)
    close(laplace.joint_covariance(problem.query), joint, rtol=1e-9)


def test_matrices_that_do_not_fit_raise_before_they_are_made(posterior_fit, monkeypatch):
    laplace, problem = posterior_fit("kron")
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)  # noqa: ARG005
    for query in (laplace.posterior_precision, laplace.posterior_covariance):
        with pytest.raises(TooLargeError, match="posterior_variance"):
            query()
    for query in (laplace.jacobians, laplace.joint_covariance):
        with pytest.raises(TooLargeError, match="fewer rows"):
            query(problem.query)


# Samples of weights


@posteriors
def test_function_samples_are_the_linearized_function_at_the_sampled_weights(name, posterior_fit):
    estimator, problem = posterior_fit(name)
    weights = estimator.sample_weights(6, seed=4)
    jacobian, f = estimator.jacobians(problem.query)
    expected = f + torch.einsum("mcp,kp->kmc", jacobian, weights - estimator.theta_)
    close(estimator.sample(problem.query, 6, seed=4), expected)
    assert torch.equal(estimator.sample_weights(6, seed=4), weights)
    assert not torch.equal(estimator.sample_weights(6, seed=5), weights)


@structures
def test_the_moments_of_sampled_weights_are_those_of_the_posterior(name, posterior_fit):
    laplace, _ = posterior_fit(name)
    n = 1500 if name in ("cg", "matrix_free_dual", "dual", "lowrank") else 6000
    displaced = laplace.sample_weights(n) - laplace.theta_
    expected = over_all_weights(laplace, laplace.posterior_covariance())
    found = displaced.T @ displaced / n
    diagonal = expected.diagonal()
    error = ((diagonal.outer(diagonal) + expected.square()) / n).sqrt()
    assert bool(((found - expected).abs() <= 6 * error + 1e-12).all())
    assert bool((displaced.mean(0).abs() <= 6 * (diagonal / n).sqrt() + 1e-12).all())


@pytest.mark.parametrize("name", ["draws", "draws, last layer"])
def test_the_draws_of_regvar_are_weight_samples_of_the_posterior(name, make_problem):
    """With and without the last layer in closed form, their covariance is A⁻¹."""
    problem = make_problem("regression")
    regularizer = PosteriorDraws(
        3000, rao_blackwell=None if name == "draws" else "last_layer", variance_estimate="monte_carlo"
    )
    options = {"prior_precision": GENERAL}
    regvar = RegVar(
        problem.model, problem.likelihood, regularizer=regularizer, solver=LinearResponse(tol=1e-8), **options
    ).fit(problem.loader)
    expected = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
    expected = expected.posterior_covariance()
    displaced = regvar.sample_weights(3000) - regvar.theta_
    found, diagonal = displaced.T @ displaced / 3000, expected.diagonal()
    error = ((diagonal.outer(diagonal) + expected.square()) / 3000).sqrt()
    assert bool(((found - expected).abs() <= 6 * error).all())
    with pytest.raises(UnsupportedError, match="3000"):
        regvar.sample_weights(3001)


class Tied(nn.Module):
    """A weight with two names, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.last = nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x + self.shift)))))


def test_a_state_dict_of_sampled_weights_makes_the_network_that_sample_nonlinear_runs(make_problem):
    problem = make_problem("classification", Tied())
    laplace = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=2.5).fit(problem.loader)
    weights = laplace.sample_weights(3, seed=8)
    found = laplace.sample_nonlinear(problem.query, 3, seed=8)
    assert (
        sum(dict(problem.model.named_parameters())[name].numel() for name in laplace.weight_names_) == weights.shape[1]
    )
    for row, sample in zip(weights, found, strict=True):
        state = laplace.weights_to_state_dict(row)
        assert set(state) == {"first.weight", "second.weight", "first.bias", "second.bias", "last.weight", "last.bias"}
        close(sample, functional_call(problem.model, state, (problem.query,)).detach(), rtol=1e-12)
        loaded = Tied().double()
        loaded.load_state_dict({**problem.model.state_dict(), **state})
        close(sample, loaded(problem.query).detach(), rtol=1e-12)
    stacked = laplace.weights_to_state_dict(weights)

    def run(state):
        return functional_call(problem.model, state, (problem.query,), tie_weights=False)

    ran = torch.func.vmap(run)(stacked)
    close(found, ran.detach(), rtol=1e-12)
    with pytest.raises(DataError, match="P = "):
        laplace.weights_to_state_dict(weights[:, 1:])


def test_named_weights_keep_the_dtype_of_the_model(make_problem):
    problem = make_problem("classification")
    model = problem.model.to(torch.bfloat16)
    laplace = LinearizedLaplace(model, problem.likelihood, prior_precision=2.5)
    laplace.fit([(x.to(torch.bfloat16), y) for x, y in problem.loader])
    state = laplace.weights_to_state_dict(laplace.sample_weights(1)[0])
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


@kinds
def test_nonlinear_predictions_average_forward_passes_of_the_network(kind, posterior_fit):
    laplace, problem = posterior_fit("kron", kind)
    made = laplace.predict_nonlinear(problem.query, n_samples=40, seed=3)
    states = [laplace.weights_to_state_dict(row) for row in laplace.sample_weights(40, seed=3)]
    outputs = torch.stack([functional_call(problem.model, state, (problem.query,)) for state in states]).detach()
    close(made.samples, outputs, rtol=1e-12)
    close(made.mean, outputs.mean(0), rtol=1e-12)
    close(made.epistemic_variance, outputs.var(0), rtol=1e-9)
    if kind == "classification":
        close(made.probs, outputs.softmax(-1).mean(0), rtol=1e-9)
    else:
        close(made.total_variance, outputs.var(0) + 0.6**2, rtol=1e-9)


@kinds
def test_nonlinear_predictions_are_calibrated_and_in_original_units(kind, make_problem):
    problem = make_problem(kind)
    shift, scale = torch.tensor([100.0, -30.0]).double(), torch.tensor([10.0, 0.2]).double()
    regression = kind == "regression"
    likelihood = Gaussian(0.6, target_shift=shift, target_scale=scale) if regression else problem.likelihood
    laplace = LinearizedLaplace(problem.model, likelihood, prior_precision=2.5)
    laplace.fit(problem.loader[:2], val_loader=problem.loader[2:])
    calibration = laplace.calibration_.calibration
    factor, second = calibration.variance_scale, calibration.noise_or_temperature
    assert (factor, second) != (1, 1)
    weights = laplace.theta_ + factor**0.5 * (laplace.sample_weights(40, seed=3) - laplace.theta_)
    states = [laplace.weights_to_state_dict(row) for row in weights]
    outputs = torch.stack([functional_call(problem.model, state, (problem.query,)) for state in states]).detach()
    made = laplace.predict_nonlinear(problem.query, n_samples=40, seed=3)
    if not regression:
        close(made.mean, outputs.mean(0) / second, rtol=1e-9)
        close(made.samples, outputs / second, rtol=1e-9)
        close(made.probs, (outputs / second).softmax(-1).mean(0), rtol=1e-9)
        return
    close(made.mean, shift + scale * outputs.mean(0), rtol=1e-9)
    close(made.samples, shift + scale * outputs, rtol=1e-9)
    close(made.std, scale * (outputs.var(0) + (0.6 * second) ** 2).sqrt(), rtol=1e-9)


@kinds
def test_nonlinear_predictions_without_variance_are_those_of_the_network(kind, make_problem):
    problem = make_problem(kind)
    laplace = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=2.5)
    laplace.fit(problem.loader[:2], val_loader=problem.loader[2:])
    record = laplace.calibration_
    calibration = replace(record.calibration, variance_scale=0.0, noise_or_temperature=1.0)
    laplace.calibration_ = replace(record, calibration=calibration)
    made = laplace.predict_nonlinear(problem.query, n_samples=5)
    close(made.mean, problem.model(problem.query).detach(), rtol=1e-12)
    assert float(made.epistemic_variance.max()) < 1e-24


def test_over_the_last_layer_the_network_is_linear_in_its_weights(posterior_fit):
    laplace, problem = posterior_fit("last layer")
    close(laplace.sample_nonlinear(problem.query, 5, seed=2), laplace.sample(problem.query, 5, seed=2), rtol=1e-12)


class HiddenUse(nn.Module):
    """A weight whose part without a gradient moves the outputs."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        with torch.no_grad():
            shift = self.inner.weight.sum().square()
        return self.inner(x) + shift


def test_a_network_that_cannot_be_computed_at_other_weights_raises(make_problem):
    problem = make_problem("classification", HiddenUse())
    laplace = LinearizedLaplace(problem.model, problem.likelihood, inverse="cg").fit(problem.loader)
    with pytest.raises(ModelError, match="linearized function"):
        laplace.sample_nonlinear(problem.query, 2)


# Independent outputs


@kinds
@pytest.mark.parametrize("name", ["kron", "last layer", "draws"])
def test_independent_samples_have_the_variance_and_no_correlations(name, kind, posterior_fit):
    estimator, problem = posterior_fit(name, kind)
    x, n = problem.query[:2], 20_000
    samples = estimator.sample_independent(x, n, seed=1)
    mean, variance = estimator.predict(x).mean, estimator.variance(x)
    noise = ((samples - mean) / variance.sqrt()).flatten(1)
    assert float((noise.T @ noise / n - torch.eye(noise.shape[1])).abs().max()) < 6 * (2 / n) ** 0.5
    assert torch.equal(estimator.sample_independent(x, n, seed=1), samples)


def test_a_mean_link_over_independent_samples(posterior_fit):
    laplace, problem = posterior_fit("kron")
    made = laplace.predict(problem.query, link_approx="mc_independent", n_samples=50)
    close(made.probs, laplace.sample_independent(problem.query, 50).softmax(-1).mean(0), rtol=1e-9)
    assert made.link_approx == "mc_independent"
    assert made.calibrated(variance_scale=0.5).link_approx == "mc_independent"


class Sizes(TorchDispatchMode):
    """Records the shapes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes += [leaf.shape for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result


N_CLASSES = 37


def blocks_between_classes(query):
    """The shapes of the C × C blocks, one for each row, that a query computes."""
    with Sizes() as sizes:
        query()
    return [shape for shape in sizes.shapes if shape[-2:] == (N_CLASSES, N_CLASSES) and len(shape) == 3]


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_a_variance_over_the_last_layer_makes_no_block_between_classes(structure, make_problem):
    model = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, N_CLASSES))
    problem = make_problem("classification", model, n=5)
    laplace = LastLayerLaplace(problem.model, problem.likelihood, hessian_structure=structure).fit(problem.loader)
    x = problem.query
    expected = laplace.covariance(x).diagonal(dim1=1, dim2=2)
    assert blocks_between_classes(lambda: laplace.covariance(x))
    assert blocks_between_classes(lambda: laplace.variance(x)) == []
    assert blocks_between_classes(lambda: laplace.predict(x, link_approx="mc_independent")) == []
    close(laplace.variance(x), expected)


@pytest.mark.parametrize("inverse", ["cholesky", "dual", "cg"])
def test_a_variance_along_jacobian_rows_makes_no_block_between_classes(inverse, make_problem):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, N_CLASSES))
    problem = make_problem("classification", model, n=3)
    laplace = LinearizedLaplace(problem.model, problem.likelihood, inverse=inverse).fit(problem.loader)
    jacobian, _ = laplace.jacobians(problem.query)
    assert blocks_between_classes(lambda: laplace.precision_.covariance(jacobian))
    assert blocks_between_classes(lambda: laplace.precision_.variance(jacobian)) == []
    close(laplace.precision_.variance(jacobian), laplace.covariance(problem.query).diagonal(dim1=1, dim2=2))


# Joint covariances


@pytest.mark.parametrize("name", REGVAR)
def test_the_joint_covariance_of_draws_has_the_covariances_on_its_diagonal(name, posterior_fit):
    regvar, problem = posterior_fit(name, "regression")
    joint = regvar.joint_covariance(problem.query)
    close(torch.einsum("mcmd->mcd", joint), regvar.covariance(problem.query))
    close(joint, joint.permute(2, 3, 0, 1))
    flat = joint.reshape(14, 14)
    assert torch.linalg.eigvalsh(flat)[0] > -1e-9 * flat.abs().max()
    if name != "bounds":
        return
    exact = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=1.9).fit(problem.loader)
    assert float((joint - exact.joint_covariance(problem.query)).norm() / joint.norm()) < 0.6


def test_many_draws_have_the_exact_joint_covariance(make_problem):
    problem = make_problem("regression")
    options = {"prior_precision": GENERAL}
    exact = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
    regularizer = PosteriorDraws(3000, variance_estimate="monte_carlo")
    regvar = RegVar(problem.model, problem.likelihood, regularizer=regularizer, solver=LinearResponse(), **options)
    found = regvar.fit(problem.loader).joint_covariance(problem.query).reshape(14, 14)
    expected = exact.joint_covariance(problem.query).reshape(14, 14)
    diagonal = expected.diagonal()
    error = ((diagonal.outer(diagonal) + expected.square()) / 3000).sqrt()
    assert bool(((found - expected).abs() <= 6 * error).all())


def test_the_joint_covariance_of_tokens_is_that_of_the_same_weights():
    """A last layer that is used at every token: closed form on features against Jacobians."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 2, 4, generator=generator).double()
    y = torch.randint(0, 3, (8, 2), generator=generator)
    options = {"likelihood": Categorical(class_dim=-1), "prior_precision": 1.9}
    loader = [(x[:5], y[:5]), (x[5:], y[5:])]
    model = model.double().eval()
    closed = LastLayerLaplace(model, **options).fit(loader)
    dense = LinearizedLaplace(model, subset_of_weights="last_layer", **options).fit(loader)
    query = torch.randn(3, 2, 4, generator=generator).double()
    found = closed.joint_covariance(query)
    assert found.shape == (3, 6, 3, 6)
    close(found, dense.joint_covariance(query))


# Errors


@pytest.mark.parametrize("kind", [LinearizedLaplace, LastLayerLaplace, SubnetworkLaplace, DeepEnsemble, MAP])
def test_queries_about_weights_before_fit_raise(kind, make_problem):
    problem = make_problem("classification")
    options = {"members": [copy.deepcopy(problem.model)]} if kind is DeepEnsemble else {}
    estimator = kind(problem.model, problem.likelihood, **options)
    for query in (
        lambda: estimator.sample_weights(2),
        lambda: estimator.jacobians(problem.query),
        lambda: estimator.joint_covariance(problem.query),
        lambda: estimator.sample_nonlinear(problem.query, 2),
        lambda: estimator.sample_independent(problem.query, 2),
        estimator.posterior_precision,
        estimator.posterior_covariance,
        estimator.posterior_variance,
        lambda: estimator.weight_names_,
    ):
        with pytest.raises(NotFittedError):
            query()


def test_estimators_without_a_posterior_over_weights_say_so(make_problem):
    problem = make_problem("classification")
    plain = MAP(problem.model, problem.likelihood).fit(problem.loader)
    for query in (
        lambda: plain.sample_weights(2),
        lambda: plain.joint_covariance(problem.query),
        lambda: plain.sample_nonlinear(problem.query, 2),
        plain.posterior_precision,
        plain.posterior_covariance,
        plain.posterior_variance,
    ):
        with pytest.raises(UnsupportedError, match="MAP"):
            query()
    close(plain.jacobians(problem.query)[1], problem.model(problem.query).detach(), rtol=1e-12)


def test_weights_are_not_sampled_around_another_model(make_problem):
    problem = make_problem("classification")
    laplace = LinearizedLaplace(problem.model, problem.likelihood).fit(problem.loader)
    with torch.no_grad():
        next(problem.model.parameters())[0, 0] += 1e-9
    with pytest.raises(ModelChangedError):
        laplace.sample_weights(2)


def test_the_examples_of_the_module_run():
    assert doctest.testmod(weight_space).failed == 0
