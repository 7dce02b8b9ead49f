"""Jacobian rows are those of plain automatic differentiation, for many layers and for any subset."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from estimators import LinearizedLaplace
from estimators.models import Network
from estimators.models.subsets import matching_names


def images(*layers, features):
    return lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3))


def mlp(*between):
    return lambda: nn.Sequential(nn.Linear(4, 5), *between, nn.Linear(5, 3))


PLAIN = {
    "overwriting relu": (mlp(nn.ReLU(inplace=True)), (4,)),
    "overwriting others": (mlp(nn.ELU(inplace=True), nn.Linear(5, 5), nn.LeakyReLU(0.2, inplace=True)), (4,)),
    "overwriting dropout": (mlp(nn.SELU(inplace=True), nn.Dropout(0.5, inplace=True)), (4,)),
    "log sigmoid": (mlp(nn.LogSigmoid()), (4,)),
    "an empty part": (mlp(nn.Sequential(), nn.Identity()), (4,)),
    "ends in an activation": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh()), (4,)),
    "linear at every step": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Flatten(), nn.Linear(10, 3)), (2, 4)),
    "groups": (images(nn.Conv2d(2, 4, 3, groups=2), nn.Sigmoid(), features=16), (2, 4, 4)),
    "three dimensions": (images(nn.Conv3d(1, 2, 2), nn.Tanh(), features=54), (1, 4, 4, 4)),
    "stride with a rest": (images(nn.Conv2d(1, 2, 3, stride=2, dilation=1), features=8), (1, 6, 6)),
    "dilated stride": (images(nn.Conv2d(1, 2, 2, stride=2, dilation=2), features=18), (1, 7, 7)),
    "pools with padding": (
        images(nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(1, 2, 2), nn.AvgPool2d(2, padding=1), features=8),
        (1, 5, 5),
    ),
    "zeros around": (images(nn.ZeroPad2d((1, 0, 2, 0)), nn.Conv2d(1, 2, 3), features=18), (1, 3, 4)),
}


class OneMore(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def shared_activation():
    tanh = nn.Tanh()
    return mlp(tanh, nn.Linear(5, 5), tanh)()


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


OTHERS = {
    "a subclass with its own forward": (mlp(nn.Tanh(), OneMore(5, 5)), (4,)),
    "a shared activation": (shared_activation, (4,)),
    "a tied weight": (tied, (4,)),
    "circular padding": (images(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), features=32), (1, 4, 4)),
    "reflected padding": (images(nn.Conv1d(1, 2, 3, padding=1, padding_mode="reflect"), features=8), (1, 4)),
    "padding by name": (images(nn.Conv2d(1, 2, 3, padding="same"), features=32), (1, 4, 4)),
    "softplus": (mlp(nn.Softplus()), (4,)),
    "batch norm": (mlp(nn.BatchNorm1d(5)), (4,)),
}


NETWORKS = PLAIN | OTHERS


def by_torch(model, names, x):
    """jacrev of the user's own module, over all rows at once."""
    chosen = {name: p.detach() for name, p in model.named_parameters() if name in names}
    params = jacrev(lambda parameters: functional_call(model, parameters, (x,)))(chosen)
    return torch.cat([params[name].flatten(2) for name in names], dim=-1).detach()


def inputs(shape, n=5):
    return torch.randn(n, *shape, dtype=torch.float64)


def rows_of(model, subset="all"):
    return Network(model, matching_names(model, subset)).jacobian


@pytest.mark.parametrize("name", NETWORKS)
def test_rows_are_the_jacobian_and_leave_model_and_inputs_as_they_were(name, untouched):
    build, shape = NETWORKS[name]
    model, x = build().double().eval(), inputs(shape)
    exact, kept = by_torch(model, matching_names(model, "all"), x), x.clone()
    with untouched(model):
        assert torch.allclose(rows_of(model)(x), exact, atol=1e-12)
    assert torch.equal(x, kept)
    assert not x.requires_grad


@pytest.mark.parametrize("subset", ["all", "0.*", "*.bias", ["3.weight", "0.bias"], "1.1.weight"], ids=str)
@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(4, elementwise_affine=False)], ids=["plain", "norm"])
def test_the_columns_are_those_of_the_subset_in_its_order(subset, norm):
    inner = nn.Sequential(nn.Tanh(), nn.Linear(5, 4))
    model = nn.Sequential(nn.Linear(4, 5), inner, norm, nn.Linear(4, 3)).double().eval()
    network, x = Network(model, matching_names(model, subset)), inputs((4,))
    assert torch.allclose(network.jacobian(x), by_torch(model, list(network.subset.shapes), x), atol=1e-12)
    assert network.jacobian_backend == "torch.func"


@pytest.mark.parametrize("n", [1, 2, 9])
def test_rows_do_not_depend_on_the_others_in_the_batch(n):
    model, x = mlp(nn.Tanh())().double().eval(), inputs((4,), 9)
    rows = rows_of(model)
    whole = rows(x)
    assert torch.allclose(torch.cat([rows(part) for part in x.split(n)]), whole, atol=1e-13)


def test_a_sequential_may_get_its_argument_by_name(make_problem):
    problem = make_problem()
    options = {"prior_precision": 2.5, "inverse": "dual"}
    plain = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
    named = [{"input": x, "labels": y} for x, y in problem.loader]
    fitted = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(named)
    assert torch.equal(fitted.variance({"input": problem.query}), plain.variance(problem.query))


@pytest.mark.parametrize(
    ("curvature", "inverse"),
    [("ggn", "cholesky"), ("ggn", "dual"), ("ggn", "cg"), ("hessian", "cholesky"), ("hessian", "cg")],
)
def test_activations_that_overwrite_their_input_change_nothing(curvature, inverse, make_problem):
    def covariance(*, inplace):
        torch.manual_seed(1)
        layers = nn.Linear(4, 5), nn.ELU(inplace=inplace), nn.Linear(5, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 3)
        problem = make_problem(model=nn.Sequential(*layers), delta=60.0)
        options = {"prior_precision": problem.delta, "inverse": inverse, "curvature": curvature}
        fitted = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
        return fitted.covariance(problem.query)

    assert torch.allclose(covariance(inplace=True), covariance(inplace=False), rtol=1e-9, atol=1e-14)
