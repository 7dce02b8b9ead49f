"""The dense GGN from factors, the sum over outputs first: against the Hessian of the linearised network."""

import pytest
import torch
from once_a_row import NETWORKS, Twice, wide
from torch import nn

from estimators import LinearizedLaplace
from estimators.curvature.layerwise import ggn as layered_ggn
from estimators.curvature.layerwise.ggn import worthwhile
from estimators.data import TrainingData
from estimators.models import Network
from estimators.models.layer_jacobians import LayerwiseJacobian
from estimators.numerics.symmetric import add_gram, gram, mirror
from estimators.objective import LabelLoss, Objective, Prior


def objective_of(problem):
    network = Network(problem.model, [name for name, p in problem.model.named_parameters() if p.requires_grad])
    batches = TrainingData.checked(problem.loader, network, problem.likelihood)
    delta = torch.full_like(network.theta, problem.delta)
    return Objective(network, LabelLoss(problem.likelihood), Prior(delta, torch.zeros_like(delta)), batches)


def layers_of(objective):
    return LayerwiseJacobian(objective.network, next(iter(objective.batches)).x)


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_hessian_of_the_linearised_network(name, chunk, make_problem, by_hand, monkeypatch):
    problem = make_problem(model=NETWORKS[name]())
    objective = objective_of(problem)
    monkeypatch.setattr(layered_ggn, "rows_per_chunk", lambda _: chunk)
    found = layered_ggn.layered_ggn(objective, layers_of(objective))
    assert torch.allclose(found, by_hand(problem).data_ggn(), rtol=1e-10, atol=1e-12)


def test_it_is_taken_where_it_saves_something(make_problem):
    cases = [(wide(3), True), (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), False), (Twice(), False)]
    for model, expected in cases:
        objective = objective_of(make_problem(model=model))
        assert worthwhile(layers_of(objective)) is expected
    objective = objective_of(make_problem("regression", model=wide(2)))
    assert not worthwhile(layers_of(objective))


def test_laplace_says_that_it_took_it(make_problem, by_hand):
    problem = make_problem(model=wide(3))
    options = {"prior_precision": problem.delta, "inverse": "cholesky"}
    fitted = LinearizedLaplace(problem.model, problem.likelihood, **options).fit(problem.loader)
    assert fitted.jacobian_backend_ == "layers"
    exact = by_hand(problem).covariance(problem.query)
    assert torch.allclose(fitted.covariance(problem.query), exact, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("n", [1, 511, 512, 513, 1100])
def test_half_of_a_product_and_its_mirror_are_the_whole(n):
    rows = torch.randn(n, 7, dtype=torch.float64)
    assert torch.allclose(gram(rows), rows @ rows.T, rtol=1e-12, atol=1e-12)
    total = torch.ones(n, n, dtype=torch.float64)
    add_gram(total, rows)
    mirror(total)
    assert torch.allclose(total, 1 + rows @ rows.T, rtol=1e-12, atol=1e-12)
