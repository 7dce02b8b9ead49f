"""RegVar where weights have a derivative of 0 at every training row: unseen tokens, constant inputs, dead units."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from estimators import Gaussian, LinearizedLaplace, RegVar

DELTAS = {"*bias": 0.4, "*": 1.7}


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(16, 5), nn.Linear(15, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(torch.tanh(self.table(x).flatten(1)))))


def unseen_tokens(generator):
    """Token 9 and all after it do not occur in training."""
    return Tokens(), torch.randint(9, (90, 3), generator=generator), torch.randint(16, (40, 3), generator=generator)


def zero_columns(generator):
    x, queries = torch.randn(90, 10, generator=generator), torch.randn(40, 10, generator=generator)
    x[:, 6:] = 0
    layers = (nn.Linear(10, 22), nn.GELU(), nn.Linear(22, 22), nn.GELU(), nn.Linear(22, 3))
    return nn.Sequential(*layers), x, queries


class FeatureOfLastLayer(nn.Module):
    """The last feature is 0 at every training row, so that weights of the last layer have a derivative of 0 there."""

    def __init__(self):
        super().__init__()
        self.hidden, self.body, self.head = nn.Linear(9, 22), nn.Linear(22, 22), nn.Linear(23, 3)

    def forward(self, x):
        features = torch.tanh(self.body(torch.tanh(self.hidden(x[:, :-1]))))
        return self.head(torch.cat([features, x[:, -1:]], dim=1))


def feature_of_last_layer(generator):
    x, queries = torch.randn(90, 10, generator=generator), torch.randn(40, 10, generator=generator)
    x[:, 9] = 0
    return FeatureOfLastLayer(), x, queries


KINDS = {
    "unseen tokens": unseen_tokens,
    "columns that are 0": zero_columns,
    "a feature of the last layer": feature_of_last_layer,
}


@cache
def fits(kind, dtype=torch.float64):
    """Return the exact fit, RegVar, the loader, training rows, and queries that reach untouched weights."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model, x, queries = KINDS[kind](torch.Generator().manual_seed(8))
    x, queries = (rows.to(dtype) if rows.is_floating_point() else rows for rows in (x, queries))
    y = torch.randn(90, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    double = LinearizedLaplace(model.double(), Gaussian(0.2), prior_precision=DELTAS)
    exact = double.fit([(rows.double() if rows.is_floating_point() else rows, t.double()) for rows, t in loader])
    truths = [exact.variance(rows.double() if rows.is_floating_point() else rows) for rows in (x, queries)]
    model = model.to(dtype)
    return truths, RegVar(model, Gaussian(0.2), prior_precision=DELTAS).fit(loader), loader, (x, queries)


def rms(found, truth):
    return float((found.double() / truth - 1).square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bounds_and_the_stated_error_hold_where_weights_keep_their_prior(kind, dtype):
    truths, regvar, _, rows = fits(kind, dtype)
    slack = 1e-8 if dtype == torch.float64 else 3e-4
    found = torch.cat([regvar.variance(x) for x in rows])
    assert rms(found, torch.cat(truths)) <= 2 * regvar.relative_error_ + 1e-6
    for x, truth in zip(rows, truths, strict=True):
        lower, upper = (bound.double() for bound in regvar.variance_bounds(x))
        assert bool((lower <= truth * (1 + slack)).all())
        assert bool((truth <= upper * (1 + slack)).all())


@pytest.mark.parametrize("kind", ["unseen tokens", "columns that are 0"])
def test_the_lower_bound_has_all_of_the_variance_of_untouched_weights(kind):
    """Their covariance is that of the prior, whatever the space: the bound with them is the bound without and it."""
    _, regvar, _, (_, queries) = fits(kind)
    bounds = regvar.variance_estimate_.bounds
    gradient = {name: torch.zeros_like(p) for name, p in regvar.model.named_parameters()}
    for x, y in fits(kind)[2]:
        for c in range(y.shape[1]):
            grads = torch.autograd.grad(regvar.model(x)[:, c].square().sum(), list(regvar.model.parameters()))
            for name, g in zip(gradient, grads, strict=True):
                gradient[name] += g.abs()
    untouched = torch.cat([g.flatten() for g in gradient.values()]) == 0
    assert 0 < int(untouched.sum()) < untouched.numel()
    assert torch.equal(bounds.untouched, untouched)
    jacobian = regvar.network_.jacobian(queries)
    kept = (jacobian.square() * bounds.space.scale.square())[..., untouched].sum(-1)
    plain = type(bounds).of(bounds.network, bounds.space, block=bounds.block)
    torch.testing.assert_close(bounds.variance(queries)[0], plain.variance(queries)[0] + kept, rtol=1e-9, atol=0)
    lower = bounds.covariance(queries)[0]
    torch.testing.assert_close(lower.diagonal(dim1=1, dim2=2), bounds.variance(queries)[0], rtol=1e-9, atol=0)
    along = bounds.covariance_along(jacobian)[0]
    torch.testing.assert_close(along, lower, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_refined_and_loaded_fits_know_untouched_weights(kind, tmp_path):
    truths, regvar, loader, (x, queries) = fits(kind)
    refined = regvar.refine(queries[:6], rtol=1e-3)
    for fitted in (refined, regvar):
        fitted.save(tmp_path / "fit")
        loaded = RegVar(regvar.model, Gaussian(0.2), prior_precision=DELTAS).load(tmp_path / "fit")
        for bound, again in zip(fitted.variance_bounds(queries), loaded.variance_bounds(queries), strict=True):
            assert torch.equal(bound, again)
        lower, upper = fitted.variance_bounds(queries)
        assert bool((lower <= truths[1] * (1 + 1e-8)).all())
        assert bool((truths[1] <= upper * (1 + 1e-8)).all())
    assert float((refined.variance(queries[:6]) / truths[1][:6] - 1).abs().max()) <= 1e-3
    assert refined.variance(x).shape == truths[0].shape
    assert len(loader) == 3


@pytest.mark.parametrize("seed", [9, 16])
def test_the_bounds_hold_where_the_space_nearly_contains_the_last_layer(seed):
    """Dead units: the Schur complement of the last layer is a difference of nearly equal numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 2))
        model, x = nn.Sequential(*layers).double(), torch.randn(100, 4, dtype=torch.float64)
    with torch.no_grad():
        model[0].bias -= 1.0
        model[2].bias -= 0.3
    y, optimizer = torch.stack([x[:, 0].abs(), x[:, 1] * x[:, 2]], 1), torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        ((model(x) - y).square().sum() / 0.01).backward()
        optimizer.step()
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    truth = LinearizedLaplace(model, Gaussian(0.1), prior_precision=1e-2).fit(loader).variance(x)
    lower, upper = RegVar(model, Gaussian(0.1), prior_precision=1e-2).fit(loader).variance_bounds(x)
    assert bool((lower <= truth * (1 + 3e-8)).all())
    assert bool((truth <= upper * (1 + 3e-8)).all())
