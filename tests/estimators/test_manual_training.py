"""The published recipe in one's own loop is the finite-λ refit of MeanAbsolute."""

import copy

import pytest
import torch
from torch import nn

from estimators import Gaussian, LinearResponse, MeanAbsolute, RegVar
from estimators.errors import ModelChangedError, ModelError, OptionError, UnsupportedError
from estimators.integrations import RegularizedPair, mean_absolute_penalty

N, DELTA, SIGMA = 23, 0.7, 0.6


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=g, dtype=torch.float64)
    return x, torch.randn(N, 2, generator=g, dtype=torch.float64) + 3.0


def loader(x, y, size=5):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def trained(model, *, lam=0.0, newton_steps=12):
    """A user's own full-batch training on the mean loss, polished by Newton steps to round-off."""
    x, y = data()
    parameters = list(model.parameters())

    def loss():
        f = model(x)
        mean = 0.5 * (f - y).square().sum(1).mean() / SIGMA**2
        mean = mean + 0.5 * DELTA / N * sum(p.square().sum() for p in parameters)
        return mean + mean_absolute_penalty(f, lam=lam, n_data=N) if lam else mean

    optimizer = torch.optim.LBFGS(parameters, max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    for _ in range(newton_steps):
        slope = flat(torch.autograd.grad(loss(), parameters, create_graph=True))
        rows = [flat(torch.autograd.grad(s, parameters, retain_graph=True)) for s in slope]
        step = torch.linalg.solve(torch.stack(rows), slope.detach())
        for p, piece in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
            p.data -= piece.view_as(p)
    assert float(slope.detach().norm()) < 1e-13
    return model.eval()


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def networks(make, lam):
    torch.manual_seed(3)
    model = trained(make().double())
    return model, trained(copy.deepcopy(model), lam=lam)


def reference(model, x, curvature):
    return (
        RegVar(
            model,
            Gaussian(SIGMA),
            prior_precision=DELTA,
            curvature=curvature,
            regularizer=MeanAbsolute(),
            solver=LinearResponse(tol=1e-12),
        )
        .fit(loader(*data()))
        .variance(x)
    )


def two(model, regularized, lam, **options):
    return RegularizedPair(model, regularized, Gaussian(SIGMA), lam=lam, prior_precision=DELTA, **options)


def test_a_linear_network_gives_the_response_at_any_lambda():
    query = torch.randn(7, 3, dtype=torch.float64)
    for lam in (0.01, 0.3):
        model, regularized = networks(lambda: nn.Linear(3, 2), lam)
        estimator = two(model, regularized, lam).fit(loader(*data()))
        assert torch.allclose(estimator.variance(query), reference(model, query, "ggn"), rtol=1e-6)
        assert estimator.nonlinearity_ < 1e-6


def test_the_error_of_a_network_falls_as_lambda():
    query = torch.randn(7, 3, dtype=torch.float64)
    errors = []
    for lam in (0.4, 0.04):
        model, regularized = networks(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), lam)
        found = two(model, regularized, lam).fit(loader(*data())).variance(query)
        exact = reference(model, query, "hessian")
        errors.append(float((found - exact).abs().max() / exact.max()))
    assert errors[0] < 0.05
    assert 7 < errors[0] / errors[1] < 14


def test_the_penalty_weighs_rows_alike_in_any_batch():
    f = torch.randn(12, 3, dtype=torch.float64)
    whole = mean_absolute_penalty(f, lam=0.3, n_data=12)
    parts = [mean_absolute_penalty(part, lam=0.3, n_data=12) * len(part) for part in f.split(5)]
    assert torch.allclose(whole, torch.stack(parts).sum() / 12)
    assert torch.allclose(whole, 0.3 / 12 * f.abs().sum() / 36)


def test_masked_tokens_do_not_count():
    f = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    kept = torch.cat([f[0, :2], f[1, :3]])
    found = mean_absolute_penalty(f, lam=0.3, n_data=9, mask=mask)
    assert torch.allclose(found, mean_absolute_penalty(kept, lam=0.3, n_data=9))


def test_networks_trained_apart_are_warned_about():
    model, other = (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval() for _ in range(2))
    with pytest.warns(UserWarning, match="one linear region"):
        two(model, other, 0.1).fit(loader(*data()))


def test_bad_input_is_rejected():
    f = torch.ones(4, 2)
    with pytest.raises(OptionError, match="n_data >= 1"):
        mean_absolute_penalty(f, lam=0.1, n_data=0)
    with pytest.raises(OptionError, match="lam"):
        mean_absolute_penalty(f, lam=-0.1, n_data=4)
    with pytest.raises(OptionError, match="mask of shape"):
        mean_absolute_penalty(f, lam=0.1, n_data=4, mask=torch.ones(4, 2))
    model, wider = nn.Linear(3, 2).double().eval(), nn.Linear(3, 3).double().eval()
    with pytest.raises(ModelError, match="difference in bias, weight"):
        two(model, wider, 0.1).fit(loader(*data()))


def test_a_regularized_network_that_changes_after_the_fit_is_noticed_and_covariance_is_rejected():
    model = nn.Linear(3, 2).double().eval()
    regularized = copy.deepcopy(model)
    with torch.no_grad():
        regularized.bias += 0.01
    estimator = two(model, regularized, 0.1).fit(loader(*data()))
    query = torch.randn(4, 3, dtype=torch.float64)
    assert torch.allclose(estimator.variance(query), torch.full((4, 2), 0.1, dtype=torch.float64))
    with pytest.raises(UnsupportedError):
        estimator.covariance(query)
    with torch.no_grad():
        regularized.bias += 0.01
    with pytest.raises(ModelChangedError):
        estimator.variance(query)
