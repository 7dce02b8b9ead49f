"""Convergence to a stationary point: closed form of a linear model, plain autograd, and what stays as it was."""

import warnings

import pytest
import torch
from torch import nn

from estimators.errors import NotConvergedWarning, OptionError
from estimators.likelihoods import Gaussian
from estimators.training import Recipe, train_map
from estimators.training.converge import converge_map

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(23, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(23, 2, generator=GENERATOR, dtype=torch.float64)
LABELS = torch.randint(3, (23,), generator=GENERATOR)


def batches(y, size=7):
    return list(zip(X.split(size), y.split(size), strict=True))


def test_a_linear_regression_ends_at_its_closed_form_with_a_prior_per_parameter():
    torch.manual_seed(0)
    model, sigma = nn.Linear(3, 2).double(), 0.5
    report = converge_map(
        model, Gaussian(sigma), batches(Y), prior_precision={"weight": 0.7, "bias": 2.0}, tolerance=1e-8
    )
    features = torch.cat([X, torch.ones(23, 1, dtype=torch.float64)], dim=1)
    delta = torch.diag(torch.tensor([0.7, 0.7, 0.7, 2.0], dtype=torch.float64))
    exact = torch.linalg.solve(features.T @ features / sigma**2 + delta, features.T @ Y / sigma**2).T
    found = torch.cat([model.weight, model.bias[:, None]], dim=1).detach()
    assert report.reached
    assert torch.allclose(found, exact, rtol=1e-7, atol=1e-9)


def test_the_relative_gradient_is_that_of_plain_autograd_and_the_loss_falls():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    train_map(model, "classification", batches(LABELS), prior_precision=0.4, recipe=Recipe(epochs=3))
    report = converge_map(model, "classification", batches(LABELS), prior_precision=0.4, tolerance=1e-6)
    assert not model.training
    parameters = list(model.parameters())
    nll = nn.functional.cross_entropy(model(X), LABELS, reduction="sum")
    loss = nll + 0.2 * sum(p.square().sum() for p in parameters)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    prior = 0.4 * torch.cat([p.detach().flatten() for p in parameters])
    assert float(gradient.norm() / prior.norm()) == pytest.approx(report.relative_gradient, rel=1e-6)
    assert report.relative_gradient <= 1e-6
    assert loss.item() == pytest.approx(report.loss, rel=1e-12)
    assert report.loss < report.loss_before
    assert report.gradients >= report.iterations > 0


def test_frozen_weights_and_buffers_stay_and_a_stationary_network_costs_one_look():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()
    model[0].weight.requires_grad_(False)
    frozen, statistics = model[0].weight.clone(), model[1].running_mean.clone()
    assert converge_map(model, "regression", batches(Y), prior_precision=1.0).iterations > 0
    assert torch.equal(model[0].weight, frozen)
    assert torch.equal(model[1].running_mean, statistics)
    again = converge_map(model, "regression", batches(Y), prior_precision=1.0)
    assert (again.iterations, again.reached) == (0, True)


def test_too_few_iterations_warn_with_what_was_reached():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    with pytest.warns(NotConvergedWarning, match="relative gradient"):
        report = converge_map(model, "regression", batches(Y), prior_precision=1.0, max_iterations=2, tolerance=1e-8)
    assert not report.reached
    assert report.iterations == 2


def test_float32_weights_keep_their_dtype():
    torch.manual_seed(4)
    model = nn.Linear(3, 2)
    rows = [(X.float(), Y.float())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        report = converge_map(model, "regression", rows, prior_precision=1.0, tolerance=1e-4)
    assert model.weight.dtype == torch.float32
    assert report.relative_gradient < 1e-3


@pytest.mark.parametrize("options", [{"tolerance": 0}, {"tolerance": float("nan")}, {"max_iterations": 0}])
def test_bad_options(options):
    with pytest.raises(OptionError):
        converge_map(nn.Linear(3, 2).double(), "regression", batches(Y), prior_precision=1.0, **options)
