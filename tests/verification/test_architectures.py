"""Architectures of torchvision, timm and transformers: no false alarm of the self-check, and the right variance.

Weights are random, float32. The reference is plain `backward` on the module itself, over a few small tensors.
"""

import warnings

import pytest
import torch
from architectures import ARCHITECTURES, ROWS
from plain_autograd import outputs, reference
from trust_networks.case import in_batches

from estimators import Gaussian, LinearizedLaplace, LinearResponse, Pointwise, RegVar
from estimators.errors import DerivativeRouteWarning

PRIOR_PRECISION, SIGMA = 1.7, 0.7
TOLERANCE = 2e-3  # float32 slopes, on both sides
KINDS = {
    "laplace": LinearizedLaplace,
    "pointwise": lambda *args, **options: RegVar(*args, regularizer=Pointwise(), solver=LinearResponse(), **options),
}
CASES = [
    pytest.param(name, kind, marks=[] if kind == "laplace" else pytest.mark.verification)
    for name in ARCHITECTURES
    for kind in KINDS
]


def some_weights(model):
    """Five small tensors from all depths: norms, biases, small kernels."""
    small = [name for name, p in model.named_parameters() if p.requires_grad and p.numel() <= 300]
    return small[:: max(1, (len(small) - 1) // 4)][:5]


def problem(name):
    """The network, three batches of unequal size, two queries and the likelihood."""
    model, x = ARCHITECTURES[name]()
    batches = in_batches(x, (2, 3, 2))
    f = outputs(model, x).detach()
    queries = {key: value[2:4] for key, value in x.items()} if isinstance(x, dict) else x[2:4]
    generator = torch.Generator().manual_seed(1)
    if name == "unet":
        y = torch.randn(ROWS, 1, *x.shape[2:], generator=generator)
        return model, list(zip(batches, y.split((2, 3, 2)), strict=True)), queries, Gaussian(SIGMA)
    y = torch.randint(f.shape[1], (ROWS,), generator=generator)
    return model, list(zip(batches, y.split((2, 3, 2)), strict=True)), queries, "classification"


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_an_architecture_has_its_variance_and_no_false_alarm(name, kind):
    model, loader, queries, likelihood = problem(name)
    names = some_weights(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator = KINDS[kind](model, likelihood, prior_precision=PRIOR_PRECISION, subset_of_weights=names)
        variance = estimator.fit(loader).variance(queries).flatten(1)
    assert [str(w.message) for w in caught if issubclass(w.category, DerivativeRouteWarning)] == []
    spelled = likelihood if isinstance(likelihood, str) else "regression"
    expected = reference(
        model,
        [x for x, _ in loader],
        queries,
        spelled,
        prior_precision=PRIOR_PRECISION,
        sigma=SIGMA,
        names=names,
    ).variance
    assert float(expected.max()) > 0
    assert float((variance - expected).abs().max() / expected.max()) < TOLERANCE


@pytest.mark.verification
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_weight_of_an_architecture_raises_no_alarm(name):
    """All weights, by products: the default for networks of this size."""
    model, loader, queries, likelihood = problem(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator = LinearizedLaplace(model, likelihood, prior_precision=PRIOR_PRECISION).fit(loader)
        variance = estimator.variance(queries)
    assert [str(w.message) for w in caught if issubclass(w.category, DerivativeRouteWarning)] == []
    assert bool(variance.isfinite().all())
    assert float(variance.max()) > 0


def test_twenty_architectures_and_more():
    assert len(ARCHITECTURES) >= 20
