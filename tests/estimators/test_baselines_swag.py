"""SWAG against the moments of SGD written out."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from estimators import Gaussian
from estimators.baselines import SWAG
from estimators.baselines.swag import Iterates
from estimators.errors import ConvergenceError, OptionError
from estimators.runtime.rng import member_seeds
from estimators.training import Recipe

DESCENT = Recipe(epochs=6, batch_size=7, optimizer="sgd", lr=0.02, momentum=0.5, schedule="constant")


def make():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def sgd_by_hand(problem, recipe, delta, mean):
    """θ̂ and the weights after each epoch; L/N of the ragged batches, heavy ball, by autograd on the module."""
    model, n = copy.deepcopy(problem.model), len(problem.x)
    generator = torch.Generator().manual_seed(8)
    flat = lambda: torch.cat([p.detach().reshape(-1) for p in model.parameters()])  # noqa: E731
    velocity, found = 0.0, [flat()]
    for _ in range(recipe.epochs):
        for index in torch.randperm(n, generator=generator).split(7):
            f = model(problem.x[index])
            theta = torch.cat([p.reshape(-1) for p in model.parameters()])
            loss = F.cross_entropy(f, problem.y[index], reduction="sum")
            loss = loss + len(index) / n * delta / 2 * ((theta - mean) ** 2).sum()
            slopes = torch.autograd.grad(loss, list(model.parameters()))
            velocity = recipe.momentum * velocity + torch.cat([s.reshape(-1) for s in slopes]) / 7
            moved = flat() - recipe.lr * velocity
            for p, part in zip(model.parameters(), moved.split([p.numel() for p in model.parameters()]), strict=True):
                p.data.copy_(part.view_as(p))
        found.append(flat())
    return torch.stack(found)


@pytest.mark.parametrize("max_rank", [2, 4, 20])
def test_swag_is_the_moments_of_sgd_written_out(make_problem, max_rank):
    problem = make_problem("classification", make())
    options = {"prior_precision": 2.5, "prior_mean": 0.2, "recipe": DESCENT, "max_rank": max_rank, "seed": 8}
    iterates = SWAG(problem.model, "classification", **options).fit(problem.loader).iterates_
    path = sgd_by_hand(problem, DESCENT, 2.5, 0.2)
    assert torch.allclose(iterates.mean, path.mean(0), rtol=1e-9)
    diagonal = path.square().mean(0) - path.mean(0).square()
    assert torch.allclose(iterates.diagonal, diagonal, rtol=1e-6, atol=1e-14)
    columns = torch.stack([path[t] - path[: t + 1].mean(0) for t in range(1, len(path))])[-max_rank:]
    k = min(max_rank, 6)
    assert len(columns) == k
    covariance = diagonal.diag() / 2 + sum(torch.outer(d, d) for d in columns) / (2 * (k - 1))
    assert torch.allclose(iterates.covariance(), covariance, rtol=1e-6, atol=1e-12)


def test_weights_of_swag_are_drawn_from_mean_diagonal_and_low_rank(make_problem):
    problem = make_problem("classification", make())
    iterates = SWAG(problem.model, "classification", recipe=DESCENT, max_rank=3).fit(problem.loader).iterates_
    draws = torch.stack([iterates.sample(seed) for seed in member_seeds(1, 8000)]) - iterates.mean
    scale = iterates.covariance().diagonal().sqrt()
    found = draws.T @ draws / len(draws) / torch.outer(scale, scale)
    expected = iterates.covariance() / torch.outer(scale, scale)
    assert float((found - expected).abs().max()) < 5 / math.sqrt(8000) * math.sqrt(2)
    assert float((draws.mean(0) / scale).abs().max()) < 5 / math.sqrt(8000)
    assert float((expected - torch.eye(len(scale)).double()).abs().max()) > 0.3  # not diagonal


def test_the_variance_of_swag_on_a_linear_network_is_that_of_its_weights(make_problem):
    """f = Wx + b is linear in θ: the covariance over members is J S Jᵀ, S the sample covariance of their weights."""
    problem = make_problem("regression", nn.Linear(4, 2))
    fitted = SWAG(problem.model, Gaussian(0.6), recipe=DESCENT, n_samples=6, seed=2).fit(problem.loader)
    weights = torch.stack([fitted.iterates_.sample(seed) for seed in member_seeds(2, 6)])
    jacobian = torch.func.jacrev(lambda t: problem.query @ t[:8].view(2, 4).T + t[8:])(weights[0])
    by_hand = jacobian @ torch.cov(weights.T) @ jacobian.transpose(1, 2)
    assert torch.allclose(fitted.covariance(problem.query), by_hand, rtol=1e-8, atol=1e-14)


def test_swag_over_a_subset_moves_nothing_else(make_problem):
    problem = make_problem("classification", make())
    fitted = SWAG(problem.model, "classification", subset_of_weights="last_layer", recipe=DESCENT).fit(problem.loader)
    assert fitted.iterates_.mean.shape == (18,)
    with torch.no_grad():
        features = torch.cat([problem.model[:3](problem.query), torch.ones(7, 1).double()], dim=1)
    f = fitted.member_outputs(problem.query) - problem.model(problem.query).detach()
    left = torch.linalg.svd(features)[0][:, 6:]  # what features (7, 6) cannot reach
    assert float((left.T @ f).abs().max()) < 1e-10 < float(f.abs().max())


@pytest.mark.parametrize(
    "bad",
    [{"optimizer": "adam"}, {"schedule": "cosine"}, {"average": 0.5}, {"epochs": 1}],
    ids=str,
)
def test_swag_rejects_a_recipe_other_than_sgd_with_a_constant_rate(bad, make_problem):
    recipe = Recipe(**{"optimizer": "sgd", "schedule": "constant", **bad})
    with pytest.raises(OptionError, match="SGD with optimizer"):
        SWAG(make_problem().model, "classification", recipe=recipe)


def test_swag_rejects_too_few_and_what_diverges(make_problem):
    problem = make_problem("regression", nn.Linear(4, 2))
    for name in ("max_rank", "n_samples"):
        with pytest.raises(OptionError, match=f"{name} >= 2.*1"):
            SWAG(problem.model, "regression", **{name: 1})
    wild = Recipe(epochs=400, optimizer="sgd", lr=1e3, schedule="constant")
    with pytest.raises(ConvergenceError, match="smaller lr"):
        SWAG(problem.model, "regression", recipe=wild).fit(problem.loader)


def test_iterates_far_from_zero_keep_their_variance():
    """mean θ² − θ̄² would lose all digits at 1e8."""
    path = 1e8 + torch.arange(5, dtype=torch.float64)[:, None] * torch.tensor([0.1, 0.2]).double()
    iterates = Iterates(path[0], 3)
    for theta in path[1:]:
        iterates.add(theta)
    assert torch.allclose(iterates.diagonal, torch.tensor([0.02, 0.08]).double(), rtol=1e-6)
