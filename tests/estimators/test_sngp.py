"""Bounded layers, random features, and the Laplace approximation of the last layer on them."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from estimators import Gaussian, LastLayerLaplace
from estimators.baselines import SNGP
from estimators.baselines.sngp_layers import RandomFeatures, SpectralBound, bound_layers, unbound_layers
from estimators.errors import ModelError, NoLastLayerError, OptionError
from estimators.training import Recipe

D, DELTA = 48, 0.7
RECIPE = Recipe(epochs=30, batch_size=16, lr=2e-2)


def network():
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def rows(kind, n=50):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    f = torch.stack([3 * x[:, 0], x[:, 1] * x[:, 2]], 1)
    return x, {"regression": f, "classification": f.argmax(-1), "binary": (f > 0).double()}[kind]


def fitted(kind, **options):
    torch.manual_seed(0)
    x, y = rows(kind)
    options = {"make_model": network, "recipe": RECIPE, "n_features": D, "prior_precision": DELTA, **options}
    likelihood = Gaussian(torch.tensor([0.4, 0.9]).double()) if kind == "regression" else kind
    return SNGP(network().eval(), likelihood, **options).fit(list(zip(x.split(17), y.split(17), strict=True))), x, y


def as_network(sngp):
    """The trained network, with its last layer."""
    features = RandomFeatures(6, D, lengthscale=1.0, seed=0)
    model = nn.Sequential(*network()[:4], features, nn.Linear(D, 2, bias=False)).double()
    model.load_state_dict({**sngp.trained_, "5.weight": sngp.posterior_.mean})
    return model.eval()


@pytest.mark.parametrize("kind", ["regression", "classification", "binary"])
def test_mean_and_variance_are_those_of_the_trained_network(kind):
    sngp, x, y = fitted(kind)
    model = as_network(sngp)
    phi, query = (model[:5](t).detach() for t in (x, 2 * x[:7]))
    f = model(x).detach()
    assert torch.allclose(sngp.predict(2 * x[:7]).mean, model(2 * x[:7]), rtol=1e-12)
    p = f.softmax(-1) if kind == "classification" else f.sigmoid()
    weights = 1 / torch.tensor([0.16, 0.81]).double().expand_as(f) if kind == "regression" else p * (1 - p)
    for c in range(2):
        precision = DELTA * torch.eye(D).double() + sum(
            w * torch.outer(row, row) for w, row in zip(weights[:, c], phi, strict=True)
        )
        expected = (query @ torch.linalg.inv(precision) * query).sum(1)
        assert torch.allclose(sngp.variance(2 * x[:7])[:, c], expected, rtol=1e-9)
    if kind == "regression":
        laplace = LastLayerLaplace(model, sngp.likelihood, prior_precision=DELTA).fit([(x, y)])
        assert torch.allclose(laplace.joint_covariance(2 * x[:7]), sngp.joint_covariance(2 * x[:7]))


@pytest.mark.parametrize("bound", [0.5, 0.95])
def test_every_layer_of_the_body_is_bounded(bound):
    sngp, _, _ = fitted("classification", norm_bound=bound)
    norms = [torch.linalg.matrix_norm(sngp.trained_[f"{i}.weight"], ord=2) for i in (0, 2)]
    assert all(norm <= bound * (1 + 1e-9) for norm in norms)
    assert max(norms) > 0.9 * bound  # the bound is active
    free, _, _ = fitted("classification", norm_bound=None)
    assert torch.linalg.matrix_norm(free.trained_["0.weight"], ord=2) > 1


def test_the_bound_scales_large_weights_and_leaves_small_ones():
    torch.manual_seed(1)
    weight = torch.randn(5, 3, 2, 2).double()
    bound = SpectralBound(weight, 0.9)
    for _ in range(200):
        bound(weight)
    sigma = torch.linalg.svdvals(weight.flatten(1))[0]
    assert torch.allclose(bound(weight), weight * 0.9 / sigma, rtol=1e-6)
    assert torch.equal(bound(weight * 1e-3), weight * 1e-3)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 4)).double()
    layers[2].requires_grad_(False)
    before = [layers[0].weight.detach().clone(), layers[2].weight.clone()]
    bound_layers(layers, 0.3)
    assert [parametrize.is_parametrized(layer) for layer in layers] == [True, False, False]
    unbound_layers(layers)
    sigma = torch.linalg.svdvals(before[0].flatten(1))[0]
    assert torch.allclose(layers[0].weight, before[0] * 0.3 / sigma)
    assert torch.equal(layers[2].weight, before[1])
    assert not any(parametrize.is_parametrized(layer) for layer in layers)


def test_random_features_approximate_the_kernel():
    h = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    phi = RandomFeatures(4, 20_000, lengthscale=1.3, seed=2)(h)
    kernel = torch.exp(-torch.cdist(h, h).square() / (2 * 1.3**2))
    assert (phi @ phi.T - kernel).abs().max() < 5 / 20_000**0.5


def test_far_from_the_data_the_variance_grows_to_that_of_the_prior():
    sngp, x, _ = fitted("regression", n_features=1024, lengthscale=0.5, norm_bound=None)
    near, far = sngp.variance(x), sngp.variance(20 * torch.randn(40, 3).double())
    assert near.mean() < 0.5 * far.mean()
    assert (far <= 1.2 / DELTA).all()


def test_what_cannot_be_trained_is_an_error():
    x, y = rows("classification")
    options = {"make_model": network, "recipe": RECIPE}
    with pytest.raises(OptionError, match="one positive number"):
        SNGP(network(), "classification", prior_precision={"*": 1.0}, **options)
    with pytest.raises(OptionError, match="lengthscale"):
        SNGP(network(), "classification", lengthscale=-1, **options)
    with pytest.raises(NoLastLayerError):
        SNGP(nn.Sequential(network(), nn.Tanh()).eval(), "classification", **options).fit([(x, y)])
    other = {**options, "make_model": lambda: nn.Linear(3, 2).double()}
    with pytest.raises(ModelError, match="architecture"):
        SNGP(network().eval(), "classification", **other).fit([(x, y)])
