"""The descent loop: it minimises the stated objective, and keeps its promises about rows, order and modes."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from estimators import Gaussian
from estimators.baselines.map import MAP
from estimators.data import TrainingData
from estimators.errors import ConvergenceError, DataError, OptionError
from estimators.training import Recipe, fit_weights, train_map


def rows(n=37, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 4, generator=generator, dtype=dtype)
    return x, torch.sin(x[:, :2]) + 0.1 * torch.randn(n, 2, generator=generator, dtype=dtype)


@pytest.mark.parametrize("batch_size", [None, 8, 100])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_linear_network_ends_at_ridge_regression_with_the_stated_sums(batch_size, optimizer):
    x, y = rows()
    model = nn.Linear(4, 2, bias=False).double()
    sigma, delta = 0.6, 3.0
    recipe = Recipe(epochs=400, batch_size=batch_size, optimizer=optimizer, lr=0.02)
    train_map(model, Gaussian(sigma), [(x[:20], y[:20]), (x[20:], y[20:])], prior_precision=delta, recipe=recipe)
    # argmin Σ (y − Wx)²/2σ² + δ‖W‖²/2
    exact = torch.linalg.solve(x.T @ x / sigma**2 + delta * torch.eye(4).double(), x.T @ y / sigma**2).T
    assert torch.allclose(model.weight, exact, atol=4e-3)


def test_a_mapping_of_prior_precisions_holds_each_group_by_its_own():
    x, y = rows()
    model = nn.Linear(4, 2).double()
    recipe = Recipe(epochs=300, batch_size=None, lr=0.05)
    train_map(model, Gaussian(1.0), [(x, y)], prior_precision={"bias": 0.0, "*": 1e6}, recipe=recipe)
    assert float(model.weight.detach().abs().max()) < 1e-3
    assert torch.allclose(model.bias, y.mean(0), atol=1e-3)


def test_training_ends_in_eval_mode_with_batch_statistics_of_the_rows_and_frozen_weights_untouched():
    x, y = rows()
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.1), nn.Linear(5, 2)).double()
    model[0].bias.requires_grad_(requires_grad=False)
    before = model[0].bias.clone()
    train_map(model, Gaussian(0.5), [(x, y)], prior_precision=1.0, recipe=Recipe(epochs=30))
    assert not any(module.training for module in model.modules())
    assert torch.equal(model[0].bias, before)
    assert int(model[1].num_batches_tracked) == 30
    assert float((model(x).detach() - y).square().mean()) < float(y.var())


def test_the_same_seed_trains_the_same_network():
    x, y = rows()
    weights = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(9)
            model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        train_map(model, Gaussian(0.5), [(x, y)], prior_precision=1.0, recipe=Recipe(epochs=3, batch_size=8), seed=seed)
        weights.append(model[0].weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_every_epoch_sees_every_row_once_in_a_new_order():
    x, y = rows(10)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    seen = []

    def gradient(weights, batch):
        seen.append(batch.x[:, 0])
        return torch.zeros_like(weights)

    generator = torch.Generator().manual_seed(0)
    recipe = Recipe(epochs=3, batch_size=3, optimizer="sgd")
    fit_weights(
        torch.zeros(2, 5), gradient, TrainingData.unchecked(loader, keep=True), recipe=recipe, generator=generator
    )
    assert [len(b) for b in seen] == [3, 3, 3, 1] * 3
    epochs = [torch.cat(seen[i : i + 4]) for i in (0, 4, 8)]
    assert all(torch.equal(epoch.sort().values, x[:, 0].sort().values) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_a_stack_of_replicas_descends_as_each_would_alone():
    x, y = rows(20)
    batches = TrainingData.unchecked([(x, y)], keep=True)

    def gradient(weights, batch):
        return torch.einsum("bp,kp->kp", batch.x**2, weights) - 1

    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    recipe = Recipe(epochs=5, batch_size=6, optimizer="adam", lr=0.1)

    def descend(weights):
        generator = torch.Generator().manual_seed(4)
        return fit_weights(weights, gradient, batches, recipe=recipe, generator=generator)

    together = descend(start)
    assert torch.allclose(together, torch.cat([descend(start[k : k + 1]) for k in range(3)]))
    assert not torch.allclose(together, start)


def test_cosine_falls_to_zero_and_constant_stays():
    assert Recipe(lr=0.4).learning_rate(0.0) == 0.4
    assert Recipe(lr=0.4).learning_rate(0.5) == pytest.approx(0.2)
    assert Recipe(lr=0.4).learning_rate(1.0) == pytest.approx(0.0)
    assert Recipe(lr=0.4, schedule="constant").learning_rate(0.9) == 0.4


@pytest.mark.parametrize(("n", "batch_size", "epochs"), [(1024, 64, 15), (300, 64, 48), (10, None, 240), (10, 64, 240)])
def test_auto_epochs_are_fifteen_and_never_fewer_than_240_steps(n, batch_size, epochs):
    recipe = Recipe(epochs="auto", batch_size=batch_size).resolve(n)
    assert recipe.epochs == epochs
    assert recipe.epochs * math.ceil(n / (batch_size or n)) >= 240


@pytest.mark.parametrize(
    ("n", "rows", "epochs"), [(10, 2, 48), (128, 16, 30), (300, 38, 30), (512, 64, 30), (5000, 64, 15)]
)
def test_auto_batches_are_of_64_rows_and_never_fewer_than_8_an_epoch(n, rows, epochs):
    recipe = Recipe(epochs="auto", batch_size="auto").resolve(n)
    assert (recipe.batch_size, recipe.epochs) == (rows, epochs)


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"epochs": "many"},
        {"batch_size": 0},
        {"batch_size": "all"},
        {"optimizer": "lbfgs"},
        {"schedule": "step"},
        {"lr": -1.0},
        {"lr": "high"},
        {"momentum": 1.0},
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_is_rejected(bad):
    with pytest.raises(OptionError, match=str(next(iter(bad.values())))):
        Recipe(**bad)


def test_a_descent_that_diverges_raises_and_leaves_the_weights():
    x, y = rows()
    model = nn.Linear(4, 2).double()
    before = model.weight.detach().clone()
    with pytest.raises(ConvergenceError, match="smaller lr"):
        train_map(
            model, Gaussian(0.1), [(x, y)], prior_precision=1.0, recipe=Recipe(epochs=400, optimizer="sgd", lr=1e3)
        )
    assert torch.equal(model.weight, before)


def test_an_empty_loader_is_rejected():
    with pytest.raises(DataError, match="empty"):
        train_map(nn.Linear(4, 2), "regression", [], prior_precision=1.0)


def test_map_is_the_network_with_no_epistemic_variance():
    x, y = rows()
    model = nn.Linear(4, 2).double().eval()
    fitted = MAP(model, Gaussian(0.5)).fit([(x, y)])
    prediction = fitted.predict(x)
    assert torch.equal(prediction.mean, model(x).detach())
    assert float(prediction.epistemic_variance.abs().max()) == 0
    assert torch.allclose(prediction.total_variance, torch.full_like(y, 0.25))
    assert fitted.covariance(x).shape == (37, 2, 2)
    assert fitted.sample(x, 3).shape == (3, 37, 2)


def test_a_step_taken_in_parts_is_the_same_step():
    x, y = rows(37)
    weights = []
    for micro_batch_size in (None, 3, 8):
        with torch.random.fork_rng():
            torch.manual_seed(9)
            model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        recipe = Recipe(epochs=3, batch_size=8, micro_batch_size=micro_batch_size)
        train_map(model, Gaussian(0.5), [(x, y)], prior_precision=2.0, recipe=recipe)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(weights[1], weights[0], atol=1e-12)
    assert torch.allclose(weights[2], weights[0], atol=1e-12)


def test_iterates_are_averaged_with_weights_that_grow():
    """Slopes of ½w² with noise: w moves by −lr (w + e); weights Γ(t + 6)/Γ(t) at average = 1/4, as t⁶ for large t."""
    x, y = rows(16)
    batches = TrainingData.unchecked([(x[i : i + 4], y[i : i + 4]) for i in range(0, 16, 4)], keep=True)
    seen = []

    def gradient(weights, batch):
        seen.append(weights.clone())
        return 4 * (weights + batch.y.mean())

    recipe = Recipe(epochs=5, batch_size=4, optimizer="sgd", lr=0.3, momentum=0.0, schedule="constant", average=0.25)
    start = torch.ones(3, dtype=torch.float64)
    averaged = fit_weights(start, gradient, batches, recipe=recipe, generator=torch.Generator().manual_seed(0))
    last = fit_weights(
        start, gradient, batches, recipe=replace(recipe, average=0.0), generator=torch.Generator().manual_seed(0)
    )
    iterates = torch.stack([*seen[1:20], last])  # after each of 20 steps
    weights = torch.tensor([math.prod(range(t, t + 6)) for t in range(1, 21)], dtype=torch.float64)
    assert torch.allclose(averaged, weights @ iterates / weights.sum(), atol=1e-14)
    assert not torch.allclose(averaged, last, atol=1e-3)


def test_a_watch_scales_the_rate_from_then_on_and_may_put_the_weights_back():
    x, y = rows(8)
    batches = TrainingData.unchecked([(x, y)], keep=True)
    steps, ends = [], []

    def watch(weights):
        ends.append(weights.clone())
        if len(ends) == 1:
            weights.zero_()
            return 0.5
        return 1.0

    def gradient(weights, batch):
        steps.append(weights.clone())
        return torch.full_like(weights, float(len(batch)))

    recipe = Recipe(epochs=3, batch_size=None, optimizer="sgd", lr=0.1, momentum=0.5, schedule="constant")
    start = torch.ones(1, dtype=torch.float64)
    end = fit_weights(start, gradient, batches, recipe=recipe, generator=torch.Generator(), epoch_callback=watch)
    # 1 → 0.9, put back to 0 at half the rate and without momentum: −0.05, then −0.05 − 0.05 · (1 + 0.5)
    assert torch.allclose(torch.stack([*ends, end]).flatten(), torch.tensor([0.9, -0.05, -0.125, -0.125]).double())


class Noise(nn.Module):
    """The identity; in training it draws a number, as dropout would."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, x):
        if self.training:
            self.drawn.append(float(torch.rand(())))
        return x


class Watched(DataLoader):
    """Batches of three rows; notes in which order they come."""

    def __init__(self, *tensors, shuffle):
        self.__dict__["seen"] = []
        super().__init__(TensorDataset(*tensors), batch_size=3, shuffle=shuffle)

    def __iter__(self):
        for x, y in super().__iter__():
            self.seen.extend(x[:, 0].tolist())
            yield x, y


@pytest.mark.parametrize("batch_size", [None, 3])
def test_what_a_training_draws_at_random_differs_between_epochs(batch_size):
    x, y = rows(6)
    noise, recipe = Noise(), Recipe(epochs=4, batch_size=batch_size)
    train_map(
        nn.Sequential(nn.Linear(4, 2).double(), noise), "regression", [(x, y)] * 2, prior_precision=1.0, recipe=recipe
    )
    assert len(set(noise.drawn)) == len(noise.drawn) > 7


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_that_are_taken_as_they_come_come_as_the_loader_shuffles_them(shuffle):
    loader = Watched(*rows(6), shuffle=shuffle)
    recipe = Recipe(epochs=4, batch_size=None)
    train_map(nn.Linear(4, 2).double(), "regression", loader, prior_precision=1.0, recipe=recipe)
    orders = {tuple(loader.seen[i : i + 6]) for i in range(6, len(loader.seen), 6)}  # the first pass counts rows
    assert (len(orders) > 1) is shuffle
