"""Exact linearized Laplace of many architectures: the same dense formula, and both ways to its Jacobian."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from estimators import LinearizedLaplace
from estimators.errors import IndefiniteHessianError
from estimators.models import Network

KINDS = ["regression", "classification", "binary"]
INVERSES = ["cholesky", "cg"]


def fit(problem, **options):
    options = {"prior_precision": problem.delta, **options}
    return LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)


def close(found, exact, tol=1e-8):
    return float((found - exact).abs().max() / exact.abs().max()) < tol


def outputs(kind):
    return 3 if kind == "classification" else 2


class Residual(nn.Module):
    """Frozen batch statistics, a skip connection, a norm over features."""

    def __init__(self, outputs):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GELU())
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, outputs)
        self.inner[1].running_mean.copy_(torch.tensor([0.1, -0.3, 0.2, 0.0]))
        self.inner[1].running_var.copy_(torch.tensor([0.5, 2.0, 1.0, 0.7]))

    def forward(self, x):
        return self.head(self.norm(x + self.inner(x)))


class Attention(nn.Module):
    """F.scaled_dot_product_attention over a sequence."""

    def __init__(self, outputs, *, causal=False):
        super().__init__()
        self.qkv, self.head, self.causal = nn.Linear(4, 12), nn.Linear(4, outputs), causal

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.head(mixed.transpose(1, 2).flatten(-2).mean(1))


class MultiHead(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, outputs)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, outputs)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class GroupNormed(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Linear(16, outputs)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


NETWORKS = {
    "linear": (lambda c: nn.Linear(4, c), (4,)),
    "mlp": (lambda c: nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, c)), (4,)),
    "nested": (
        lambda c: nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.ELU()), nn.Dropout(0.3), nn.Linear(5, c, bias=False)),
        (4,)),
    "cnn": (
        lambda c: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(2, 3, 2, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(3, c)),
        (1, 4, 4)),
    "cnn over time": (
        lambda c: nn.Sequential(nn.Conv1d(2, 3, 3, dilation=2), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(6, c)),
        (2, 8)),
    "frozen first layer": (
        lambda c: nn.Sequential(nn.Linear(4, 5).requires_grad_(requires_grad=False), nn.Tanh(), nn.Linear(5, c)),
        (4,)),
    "gelu": (lambda c: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, c)), (4,)),
    "layer norm": (lambda c: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, c)), (4,)),
    "one layer twice": (lambda c: twice(c), (4,)),
    "group norm": (GroupNormed, (1, 4, 4)),
    "residual": (Residual, (4,)),
    "attention": (Attention, (3, 4)),
    "causal attention": (lambda c: Attention(c, causal=True), (3, 4)),
    "multi-head attention": (MultiHead, (3, 4)),
    "transformer encoder": (Encoder, (3, 4)),
}  # fmt: skip
networks = pytest.mark.parametrize("name", NETWORKS)


def twice(outputs):
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, outputs))


def network_problem(name, kind, make_problem, **options):
    build, shape = NETWORKS[name]
    return make_problem(kind, model=build(outputs(kind)), shape=shape, **options)


def networks_and_inverses():
    """Every network with every likelihood, and either with every inverse; the rest is nightly."""
    for (i, name), (j, kind), (k, inverse) in product(*map(enumerate, (NETWORKS, KINDS, INVERSES))):
        marks = () if k == (i + j) % len(INVERSES) else pytest.mark.verification
        yield pytest.param(name, kind, inverse, marks=marks, id=f"{inverse}-{kind}-{name}")


@pytest.mark.parametrize(("name", "kind", "inverse"), list(networks_and_inverses()))
def test_every_network_has_the_dense_ggn_covariance(name, kind, inverse, make_problem, by_hand):
    problem = network_problem(name, kind, make_problem)
    fitted = fit(problem, inverse=inverse)
    assert close(fitted.covariance(problem.query), by_hand(problem).covariance(problem.query))


@networks
def test_the_backend_of_the_jacobian_is_named_and_both_agree(name, make_problem):
    problem = network_problem(name, "classification", make_problem)
    fitted = fit(problem, inverse="dual")
    assert fitted.jacobian_backend_ == "torch.func"
    network = Network(problem.model, [n for n, p in problem.model.named_parameters() if p.requires_grad])
    by_torch = network.jacobian(problem.x)
    root = problem.likelihood.hessian_sqrt(network.outputs(problem.x))
    rows = torch.einsum("bck,bcp->bkp", root, by_torch).reshape(-1, network.n_parameters)
    assert torch.allclose(fitted.data_curvature_.rows, rows, atol=1e-12)


@networks
@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_every_network_has_the_dense_hessian(name, kind, make_problem, by_hand):
    problem = network_problem(name, kind, make_problem, delta=400.0)
    fitted = fit(problem, inverse="cholesky", curvature="hessian")
    assert close(
        fitted.data_curvature_.matrix + 400 * torch.eye(len(fitted.theta_)), by_hand(problem).precision("hessian")
    )
    assert fitted.jacobian_backend_ == "products"


@pytest.mark.parametrize("inverse", INVERSES)
def test_turning_query_and_key_against_each_other_makes_the_hessian_singular(inverse, make_problem):
    """Without a prior on them the loss does not change, though no output shows the direction."""
    problem = make_problem("regression", model=Attention(2), shape=(3, 4))
    free = {"qkv.*": 0.0, "*": 50.0}
    with pytest.raises(IndefiniteHessianError, match=r'query and key.*curvature="ggn"'):
        fit(problem, inverse=inverse, curvature="hessian", prior_precision=free)
