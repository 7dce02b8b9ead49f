"""The density of features against SciPy's, and what has none."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import nn

from estimators.baselines import DDU, MAP
from estimators.baselines.ddu import ClassGaussians
from estimators.errors import DataError, NoLastLayerError, OptionError, UnsupportedError


def network(outputs, *, bias=True):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs, bias=bias)).double()


def rows(kind, n=31):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    f = x @ torch.randn(3, 2, generator=generator, dtype=torch.float64)
    y = {"regression": f, "binary": (f > 0).double(), "classification": (f[:, 0] > 0.3).long() + (f[:, 0] > -0.5)}
    return x, y[kind]


def log_density(phi, labels, query, *, weight, jitter):
    """Σ_k π_k N(φ | μ_k, Σ_k), class by class."""
    n, d = phi.shape
    groups = [phi[labels == k] for k in np.unique(labels)]
    pooled = sum(len(g) / n * np.cov(g.T, bias=True) for g in groups)
    total = 0.0
    for g in groups:
        share = d / (d + len(g)) if weight is None else weight
        covariance = (1 - share) * np.cov(g.T, bias=True) + share * pooled
        covariance = covariance + jitter * np.trace(pooled) / d * np.eye(d)
        total = total + len(g) / n * multivariate_normal(g.mean(0), covariance).pdf(query)
    return np.log(total)


@pytest.mark.parametrize("kind", ["regression", "classification", "binary"])
@pytest.mark.parametrize(("weight", "jitter"), [(None, 1e-6), (0.0, 1e-3), (0.7, 0.1)])
def test_the_score_is_minus_the_log_density_of_the_features(kind, weight, jitter):
    model = network(3 if kind == "classification" else 2, bias=kind != "binary")
    x, y = rows(kind)
    ddu = DDU(model, kind, shrinkage=weight, jitter=jitter).fit([(x[:20], y[:20]), (x[20:], y[20:])])
    phi, query = (model[:2](t).detach().numpy() for t in (x, 2 * x[:7]))
    labels = {
        "regression": np.zeros(len(x)),
        "classification": y.numpy(),
        "binary": (y.double().reshape(31, -1) * torch.tensor([1.0, 2.0])).sum(-1).numpy(),
    }[kind]
    expected = -log_density(phi, labels, query, weight=weight, jitter=jitter)
    assert ddu.score(2 * x[:7]).numpy() == pytest.approx(expected, rel=1e-9)
    assert torch.equal(ddu.predict(x).mean, model(x))
    assert not ddu.variance(x).any()


def test_a_class_of_one_row_has_the_pooled_covariance():
    features = torch.randn(12, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.tensor([0] * 6 + [1] * 5 + [2])
    found = ClassGaussians.of(features, labels, shrinkage=None, jitter=0.0)
    covariance = found.roots[2] @ found.roots[2].T
    pooled = sum(len(g) / 12 * np.cov(g.T, bias=True) for g in (features[:6].numpy(), features[6:11].numpy()))
    assert covariance.numpy() == pytest.approx(3 / 4 * pooled, rel=1e-9)  # D/(D + n) with n = 1
    with pytest.raises(OptionError, match="jitter"):
        ClassGaussians.of(features, labels, shrinkage=0.0, jitter=0.0)


def test_rows_far_in_feature_space_have_the_highest_scores():
    x, y = rows("classification", n=200)
    ddu = DDU(network(3), "classification").fit([(x, y)])
    assert ddu.score(5 * x).median() > ddu.score(x).median() + 3


def test_a_float32_network_has_scores_in_float64():
    x, y = rows("classification")
    ddu = DDU(network(3).float(), "classification").fit([(x.float(), y)])
    assert ddu.score(x.float()).dtype == torch.float64


def test_what_has_no_density_is_an_error():
    x, y = rows("classification")
    with pytest.raises(NoLastLayerError):
        DDU(nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double(), "classification").fit([(x, y)])
    soft = torch.full((31, 3), 1 / 3).double()
    with pytest.raises(UnsupportedError, match="hard labels"):
        DDU(network(3), "classification").fit([(x, soft)])
    dead = network(3)
    nn.init.zeros_(dead[0].weight)
    with pytest.raises(DataError, match="vary"):
        DDU(dead, "classification").fit([(x, y)])
    with pytest.raises(OptionError, match="shrinkage"):
        DDU(network(3), "classification", shrinkage=1.5)
    with pytest.raises(UnsupportedError, match="score"):
        MAP(network(3), "classification").fit([(x, y)]).score(x)
