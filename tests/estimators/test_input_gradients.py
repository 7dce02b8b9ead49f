"""Results with a graph to the inputs, against central differences of the results without one."""

import pytest
import torch
from torch import nn
from weight_space_fits import close, kinds, posteriors

from estimators import (
    LastLayerLaplace,
    LinearizedLaplace,
    LinearResponse,
    MeanAbsolute,
    Pointwise,
    PosteriorDraws,
    RegVar,
)
from estimators.baselines import MAP, SWAG, NTKGaussianProcess
from estimators.errors import UnsupportedError


def check_gradient(query, x, rtol=1e-6):
    """The value of query(x) is that without a graph, and its gradient by x agrees with central differences.

    Compared are the derivatives of a random combination of the results in two random directions.
    """
    generator, step = torch.Generator().manual_seed(6), 1e-5
    value = query(x)
    u = torch.randn(value.shape, generator=generator, dtype=value.dtype)
    leaf = x.clone().requires_grad_()
    with_graph = query(leaf)
    assert not value.requires_grad
    close(with_graph.detach(), value, rtol=1e-8)
    (gradient,) = torch.autograd.grad((u * with_graph).sum(), leaf)
    for _ in range(2):
        r = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        difference = float((u * (query(x + step * r) - query(x - step * r))).sum()) / (2 * step)
        assert float((gradient * r).sum()) == pytest.approx(difference, abs=rtol * float((gradient * r).norm()))


@posteriors
def test_the_variance_is_differentiable_in_the_inputs(name, posterior_fit):
    estimator, problem = posterior_fit(name)
    check_gradient(estimator.variance, problem.query[: 1 if name == "cg" else 3])


@pytest.mark.parametrize(
    "name", ["cholesky", "dual", "kron", "last layer", "subnetwork", "draws, last layer", "bounds"]
)
def test_covariances_functionals_and_samples_are_differentiable_in_the_inputs(name, posterior_fit):
    estimator, problem = posterior_fit(name)
    x = problem.query[:2]
    check_gradient(estimator.covariance, x)
    check_gradient(estimator.joint_covariance, x)
    check_gradient(lambda x: estimator.sample(x, 3, seed=2), x)
    check_gradient(lambda x: estimator.variance(x, of=lambda f: f[0] * f[1]), x)


@kinds
@pytest.mark.parametrize("name", ["cholesky", "last layer", "draws"])
def test_predictions_are_differentiable_in_the_inputs(name, kind, posterior_fit):
    estimator, problem = posterior_fit(name, kind)
    x = problem.query[:2]
    check_gradient(lambda x: estimator.predict(x).mean, x)
    if kind == "regression":
        check_gradient(lambda x: estimator.predict(x).total_variance, x)
    else:
        check_gradient(lambda x: estimator.predict(x).probs, x)
        check_gradient(lambda x: estimator.predict(x, link_approx="mc", n_samples=5).entropy, x, rtol=1e-5)


@pytest.mark.parametrize("link_approx", ["probit", "mc", "mc_independent", "bridge", "bridge_norm"])
@posteriors
def test_probabilities_by_every_link_are_differentiable_in_the_inputs(name, link_approx, posterior_fit):
    estimator, problem = posterior_fit(name)
    x = problem.query[: 1 if name == "cg" else 2]

    def predicted(x):
        return estimator.predict(x, link_approx=link_approx, n_samples=5)

    check_gradient(lambda x: predicted(x).probs, x, rtol=1e-5)
    check_gradient(lambda x: predicted(x).epistemic_variance, x, rtol=1e-5)


@pytest.mark.parametrize("link_approx", ["probit", "mc", "mc_independent", "bridge", "bridge_norm"])
def test_probabilities_of_the_ntk_gaussian_process_are_differentiable_in_the_inputs(link_approx, make_problem):
    problem = make_problem()
    process = NTKGaussianProcess(problem.model, problem.likelihood, prior_precision=2.5).fit(problem.loader)
    check_gradient(
        lambda x: process.predict(x, link_approx=link_approx, n_samples=5).probs, problem.query[:2], rtol=1e-5
    )


@pytest.mark.parametrize("name", ["cholesky", "cg", "last layer"])
def test_the_variance_is_differentiable_twice(name, posterior_fit):
    laplace, problem = posterior_fit(name)

    def slope(x):
        """The first derivatives, with a graph if x requires a gradient."""
        leaf = x if x.requires_grad else x.clone().requires_grad_()
        (first,) = torch.autograd.grad(laplace.variance(leaf).sum(), leaf, create_graph=x.requires_grad)
        return first

    check_gradient(slope, problem.query[:2], rtol=1e-5)


def test_entries_of_dict_inputs_are_differentiable(make_problem):
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

        def forward(self, features, shift):
            return self.inner(features * shift)

    problem = make_problem("regression")
    model = Shifted().double().eval()
    loader = [{"features": x, "shift": 0 * x + 1.1, "labels": y} for x, y in problem.loader]
    laplace = LinearizedLaplace(model, problem.likelihood, prior_precision=2.5).fit(loader)
    features = problem.query[:3]
    check_gradient(lambda shift: laplace.variance({"features": features, "shift": shift}), 0.9 + 0 * features)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_where_autograd_is_off(mode, posterior_fit):
    laplace, problem = posterior_fit("cholesky")
    x = problem.query.clone().requires_grad_()
    with mode():
        assert torch.equal(laplace.variance(x), laplace.variance(problem.query))
        assert not laplace.predict(x).mean.requires_grad
        assert not laplace.jacobians(x)[0].requires_grad
        assert not laplace.sample_nonlinear(x, 2).requires_grad


def test_jacobians_and_forward_passes_at_other_weights_are_differentiable(posterior_fit):
    laplace, problem = posterior_fit("kron")
    x = problem.query[:2]
    check_gradient(lambda x: laplace.jacobians(x)[0], x)
    check_gradient(lambda x: laplace.jacobians(x)[1], x)
    check_gradient(lambda x: laplace.sample_nonlinear(x, 3), x)
    check_gradient(lambda x: laplace.predict_nonlinear(x, n_samples=4).probs, x)
    check_gradient(lambda x: laplace.sample_independent(x, 3), x)


def test_bounds_and_errors_of_draws_have_no_graph(posterior_fit):
    regvar, problem = posterior_fit("bounds")
    x = problem.query.clone().requires_grad_()
    for query in (regvar.variance_bounds, regvar.standard_error):
        with pytest.raises(UnsupportedError, match="detach"):
            query(x)


class Square(torch.autograd.Function):
    """x², whose backward is right, and has a derivative of 0: autograd takes the saved 2x for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(2 * x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class Squared(nn.Module):
    def forward(self, x):
        return Square.apply(x)


@pytest.mark.filterwarnings("ignore::estimators.errors.DerivativeRouteWarning")
@pytest.mark.parametrize("of", [None, lambda f: f[0] - f[1]])
def test_a_right_jacobian_with_a_wrong_derivative_by_the_inputs_is_rejected(make_problem, of):
    problem = make_problem("regression", nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Squared(), nn.Linear(6, 2)))
    laplace = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=2.5).fit(problem.loader)
    x = problem.query.clone().requires_grad_()
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="finite differences"):
            laplace.variance(x, of=of)
    assert bool(laplace.variance(x.detach()).isfinite().all())


class Kinks(nn.Module):
    """Kinks at x = 0 of many kinds, in J and in its first derivative."""

    def __init__(self, bias):
        super().__init__()
        self.first, self.last = nn.Conv1d(1, 3, 2, bias=bias), nn.Linear(9, 2, bias=bias)

    def forward(self, x):
        x = torch.cat([x[:, None], x[:, None].relu(), x[:, None].abs()], dim=-1)
        x = torch.nn.functional.max_pool1d(self.first(x).relu(), 3).clamp(max=1.0)
        return self.last(x.flatten(1) + x.flatten(1).square().floor())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", ["random", "zero", "half"])
def test_kinks_of_the_network_raise_no_error(make_problem, bias, rows):
    for seed in range(10):
        torch.manual_seed(seed)
        problem = make_problem("regression", Kinks(bias))
        laplace = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=2.5).fit(problem.loader)
        x = torch.randn(3, 4, dtype=torch.float64) * {"random": 1.0, "zero": 0.0, "half": 1.0}[rows]
        x[:, :2] *= rows != "half"
        laplace.variance(x.requires_grad_()).sum().backward()


def test_wide_networks_with_relu_raise_no_error(make_problem):
    for seed in range(10):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 900), nn.ReLU(), nn.Linear(900, 20), nn.ReLU(), nn.Linear(20, 2))
        problem = make_problem("regression", model)
        options = {"prior_precision": 2.5, "inverse": "dual"}
        laplace = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
        laplace.variance(problem.query[:2].clone().requires_grad_()).sum().backward()


class InPlace(nn.Module):
    """A forward that writes into its inputs, and attention, whose fused kernels have no second derivative."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x.mul_(0.7)
        x = x[:, None] + torch.arange(3, dtype=x.dtype)[:, None]
        return self.last(self.attention(x, x, x)[0].mean(1))


def test_attention_and_a_forward_that_writes_into_its_inputs(make_problem):
    problem = make_problem("regression", InPlace())
    loader = [(x.clone(), y) for x, y in problem.loader]
    laplace = LinearizedLaplace(problem.model, problem.likelihood, prior_precision=2.5).fit(loader)
    check_gradient(laplace.variance, problem.query[:2])
    check_gradient(lambda x: laplace.predict(x).mean, problem.query[:2])


class Encoder(nn.Module):
    """A transformer layer over three positions: attention, and two LayerNorms with weights and biases."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        positions = torch.arange(3, dtype=x.dtype)[:, None]
        return self.last(self.layer(x[:, None] * (1 + positions)).mean(1))


def normalised(norm):
    """A network with a norm layer between two linear ones."""
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 2))


NORMS = {
    "LayerNorm": lambda: normalised(nn.LayerNorm(6)),
    "GroupNorm": lambda: normalised(nn.GroupNorm(2, 6)),
    "RMSNorm": lambda: normalised(nn.RMSNorm(6)),
    "BatchNorm": lambda: normalised(nn.BatchNorm1d(6)),
    "InstanceNorm": lambda: normalised(
        nn.Sequential(nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Flatten())
    ),
    "attention": Encoder,
}
LAPLACES = {
    "all weights": lambda p: LinearizedLaplace(p.model, p.likelihood, prior_precision=2.5),
    "last layer": lambda p: LastLayerLaplace(p.model, p.likelihood, prior_precision=2.5),
    "draws": lambda p: RegVar(
        p.model, p.likelihood, prior_precision=2.5, regularizer=PosteriorDraws(9), solver=LinearResponse()
    ),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("method", LAPLACES)
def test_gradients_on_networks_with_normalisation_and_attention(name, method, make_problem):
    """vmap over reverse mode has a wrong derivative by x of the gradient by the weight of a LayerNorm."""
    torch.manual_seed(2)
    model = NORMS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    problem = make_problem("regression", model)
    estimator = LAPLACES[method](problem).fit(problem.loader)
    x = problem.query[:3]
    check_gradient(estimator.variance, x)
    check_gradient(estimator.joint_covariance, x)
    check_gradient(estimator.covariance, x)
    check_gradient(lambda x: estimator.sample(x, 3, seed=2), x)
    check_gradient(lambda x: estimator.variance(x, of=lambda f: f[0] * f[1]), x)
    check_gradient(lambda x: estimator.jacobians(x)[0], x)


def test_backward_adds_nothing_to_the_gradients_of_the_model(posterior_fit):
    laplace, problem = posterior_fit("cholesky")
    x = problem.query[:2].clone().requires_grad_()
    laplace.variance(x).sum().backward()
    assert bool(x.grad.any())
    assert all(p.grad is None for p in problem.model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: MAP(p.model, p.likelihood),
        lambda p: SWAG(p.model, p.likelihood, n_samples=3),
        lambda p: RegVar(p.model, p.likelihood, regularizer=Pointwise(), solver=LinearResponse()),
        lambda p: RegVar(p.model, p.likelihood, regularizer=MeanAbsolute(), solver=LinearResponse()),
    ],
)
def test_results_without_a_graph_raise_if_the_inputs_require_a_gradient(make, make_problem):
    problem = make_problem("classification")
    estimator = make(problem).fit(problem.loader)
    x = problem.query.clone().requires_grad_()
    for query in (estimator.variance, estimator.predict, estimator.covariance):
        with pytest.raises(UnsupportedError):
            query(x)
    assert not estimator.variance(x.detach()).requires_grad
