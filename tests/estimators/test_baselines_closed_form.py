"""Gradient norm and subnetwork against dense formulas written a second time."""

import pytest
import torch
from torch import nn

from estimators import LinearizedLaplace
from estimators.baselines import GradientNorm, SubnetworkLaplace
from estimators.errors import OptionError

KINDS = pytest.mark.parametrize("kind", ["classification", "binary", "regression"])


class Attention(nn.Module):
    """Weights that are used at many places, and some outside of linear layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.attend, self.head = (
            nn.LayerNorm(4),
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 3),
        )

    def forward(self, x):
        h = self.norm(x)
        return self.head(self.attend(h, h, h, need_weights=False)[0].mean(1))


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), (1, 3, 3)),
    "attention": (Attention, (5, 4)),
}


def gradients(model, x):
    """∂f_c/∂θ (M, C, P) by one backward each."""
    rows = []
    for one in x:
        f = model(one[None])[0]
        slopes = [torch.autograd.grad(f_c, list(model.parameters()), retain_graph=True) for f_c in f]
        rows.append(torch.stack([torch.cat([s.reshape(-1) for s in per_output]) for per_output in slopes]))
    return torch.stack(rows)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_gradient_norm_is_that_of_a_loop_over_outputs(network, make_problem):
    build, shape = NETWORKS[network]
    problem = make_problem("classification", build(), shape=shape)
    fitted = GradientNorm(problem.model, "classification", prior_precision=7.0).fit(problem.loader)
    jacobian = gradients(problem.model, problem.query)
    assert torch.allclose(fitted.variance(problem.query), jacobian.square().sum(-1), rtol=1e-10)
    assert torch.allclose(fitted.covariance(problem.query), jacobian @ jacobian.transpose(1, 2), rtol=1e-10, atol=1e-12)
    margin = gradients(Margin(problem.model), problem.query)
    found = fitted.variance(problem.query, of=lambda f: (f[0] - f[1]).tanh())
    assert torch.allclose(found, margin.square().sum(-1), rtol=1e-9)


class Margin(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        f = self.model(x)
        return (f[:, :1] - f[:, 1:2]).tanh()


def test_samples_of_the_gradient_norm_have_its_covariance(make_problem):
    problem = make_problem("classification")
    fitted = GradientNorm(problem.model, "classification").fit(problem.loader)
    deviations = fitted.sample(problem.query, 20_000, seed=3) - problem.model(problem.query).detach()
    found, exact = torch.einsum("kmc,kmd->mcd", deviations, deviations) / 20_000, fitted.covariance(problem.query)
    assert torch.allclose(found, exact, atol=6 * float(exact.max()) / 20_000**0.5)


def test_the_gradient_norm_over_the_prior_bounds_the_laplace_variance(make_problem):
    problem = make_problem("classification")
    norm = GradientNorm(problem.model, "classification").fit(problem.loader).variance(problem.query)
    laplace = LinearizedLaplace(problem.model, "classification", prior_precision=2.5).fit(problem.loader)
    assert (laplace.variance(problem.query) < norm / 2.5).all()


@pytest.mark.parametrize("subset", ["all", "last_layer", "0.*"])
@pytest.mark.parametrize("chosen_by", ["variance", "magnitude"])
def test_a_subnetwork_of_all_weights_is_the_full_laplace(subset, chosen_by, make_problem):
    problem = make_problem("classification")
    options = {"prior_precision": {"*bias": 0.7, "*": 1.9}, "subset_of_weights": subset}
    part = SubnetworkLaplace(problem.model, "classification", n_parameters=999, chosen_by=chosen_by, **options)
    full = LinearizedLaplace(problem.model, "classification", inverse="cholesky", **options).fit(problem.loader)
    part.fit(problem.loader)
    assert len(part.index_) == part.network_.n_parameters
    assert torch.allclose(part.covariance(problem.query), full.covariance(problem.query), rtol=1e-9, atol=1e-12)
    assert torch.allclose(
        part.variance(problem.query, of=lambda f: f.softmax(-1)),
        full.variance(problem.query, of=lambda f: f.softmax(-1)),
        rtol=1e-8,
    )


@KINDS
@pytest.mark.parametrize("n", [1, 7, 20])
def test_a_subnetwork_is_the_dense_formula_of_the_weights_with_the_largest_marginal_variance(
    kind, n, make_problem, by_hand
):
    problem = make_problem(kind)
    reference = by_hand(problem)
    fitted = SubnetworkLaplace(problem.model, problem.likelihood, prior_precision=2.5, n_parameters=n)
    fitted.fit(problem.loader)
    a = reference.precision()
    index = a.diagonal().argsort()[:n].sort().values  # the smallest precisions
    assert torch.equal(fitted.index_, index)
    jacobian = reference.jacobian(problem.query)[..., index]
    expected = jacobian @ torch.linalg.inv(a[index][:, index]) @ jacobian.transpose(1, 2)
    assert torch.allclose(fitted.covariance(problem.query), expected, rtol=1e-8, atol=1e-12)
    assert torch.allclose(fitted.variance(problem.query), expected.diagonal(dim1=1, dim2=2), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("chosen_by", ["variance", "magnitude"])
def test_each_weight_of_a_subnetwork_has_its_own_prior(chosen_by, make_problem, by_hand):
    problem = make_problem("classification")
    reference = by_hand(problem)
    delta = torch.full_like(reference.theta, 1.9)
    delta[20:25] = delta[40:] = 0.3  # the two biases
    options = {"prior_precision": {"*bias": 0.3, "*": 1.9}, "n_parameters": 30, "chosen_by": chosen_by}
    fitted = SubnetworkLaplace(problem.model, "classification", **options).fit(problem.loader)
    a, index = reference.precision(delta=delta), fitted.index_
    assert delta[index].unique().tolist() == [0.3, 1.9]
    assert not torch.equal(delta[index], delta[:30])
    jacobian = reference.jacobian(problem.query)[..., index]
    expected = jacobian @ torch.linalg.solve(a[index][:, index], jacobian.transpose(1, 2))
    assert torch.allclose(fitted.covariance(problem.query), expected, rtol=1e-8, atol=1e-12)


def test_the_largest_weights_are_chosen_by_magnitude(make_problem, by_hand):
    problem = make_problem("classification")
    fitted = SubnetworkLaplace(problem.model, "classification", n_parameters=6, chosen_by="magnitude")
    theta = by_hand(problem).theta
    index = fitted.fit(problem.loader).index_
    assert len(index) == 6
    others = torch.ones(len(theta), dtype=torch.bool).index_fill(0, index, value=False)
    assert float(theta[index].abs().min()) > float(theta[others].abs().max())


@KINDS
def test_no_subnetwork_has_more_variance_than_a_larger_one_or_than_the_whole(kind, make_problem):
    problem = make_problem(kind)
    options = {"prior_precision": 2.5}
    largest = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
    above = largest.variance(problem.query)
    for n in (35, 21, 12, 5, 1):  # the weights of each are among those of the one before
        part = SubnetworkLaplace(problem.model, problem.likelihood, n_parameters=n, **options).fit(problem.loader)
        assert (part.variance(problem.query) <= above + 1e-12).all()
        above = part.variance(problem.query)
    assert float(above.max()) > 0


def test_samples_of_a_subnetwork_have_its_covariance(make_problem):
    problem = make_problem("classification")
    fitted = SubnetworkLaplace(problem.model, "classification", prior_precision=2.5, n_parameters=12)
    exact = fitted.fit(problem.loader).covariance(problem.query)
    deviations = fitted.sample(problem.query, 20_000, seed=3) - problem.model(problem.query).detach()
    found = torch.einsum("kmc,kmd->mcd", deviations, deviations) / 20_000
    assert torch.allclose(found, exact, atol=6 * float(exact.max()) / 20_000**0.5)


def test_the_precision_of_a_subnetwork_solves_in_its_place(make_problem):
    problem = make_problem("classification")
    fitted = SubnetworkLaplace(problem.model, "classification", prior_precision=2.5, n_parameters=5).fit(problem.loader)
    v = torch.randn(3, fitted.network_.n_parameters, dtype=torch.float64)
    solved, index = fitted.precision_.solve(v), fitted.index_
    a = fitted.data_curvature_.matrix + 2.5 * torch.eye(5).double()
    assert torch.allclose(solved[:, index], torch.linalg.solve(a, v[:, index].T).T, rtol=1e-10)
    assert int((solved != 0).sum()) == 15
    assert torch.allclose(fitted.precision_.log_det(), torch.logdet(a))


def test_subnetwork_options_that_cannot_be_are_rejected(make_problem):
    model = make_problem().model
    for bad in (0, -1, 2.5):
        with pytest.raises(OptionError, match="n_parameters >= 1"):
            SubnetworkLaplace(model, "classification", n_parameters=bad)
    with pytest.raises(OptionError, match=r"chosen_by.*random"):
        SubnetworkLaplace(model, "classification", chosen_by="random")
