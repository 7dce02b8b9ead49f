"""Against laplace-torch, an implementation by others: full GGN of all weights and of the last layer."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from estimators import Bernoulli, Categorical, Gaussian, LastLayerLaplace, LinearizedLaplace

DELTA, SIGMA = 2.5, 0.5
NETWORKS = {
    "mlp": (lambda c: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, c)), (4,)),
    "cnn": (lambda c: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, c)), (1, 4, 4)),
}
cases = pytest.mark.parametrize("network", NETWORKS)
kinds = pytest.mark.parametrize("kind", ["regression", "classification"])


@pytest.fixture
def laplace():
    """The peer; its import and its methods warn of their own dependencies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("laplace")


@pytest.fixture(autouse=True)
def _double():
    """It makes some tensors of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def problem(network, kind, n=23):
    build, shape = NETWORKS[network]
    generator = torch.Generator().manual_seed(3)
    outputs = 2 if kind == "regression" else 3
    model = build(outputs).eval()
    x = torch.randn(n, *shape, generator=generator)
    labels = torch.randint(0, 3, (n,), generator=generator)
    y = torch.randn(n, 2, generator=generator) if kind == "regression" else labels
    query = torch.randn(6, *shape, generator=generator)
    likelihood = Gaussian(SIGMA) if kind == "regression" else Categorical()
    return model, likelihood, DataLoader(TensorDataset(x, y), batch_size=6), query


def peer(laplace, model, kind, loader, subset, structure="full"):
    options = {"sigma_noise": SIGMA} if kind == "regression" else {}
    fitted = laplace.Laplace(
        model,
        kind,
        subset_of_weights=subset,
        hessian_structure=structure,
        prior_precision=DELTA,
        backend=laplace.curvature.CurvlinopsGGN,
        **options,
    )
    fitted.fit(loader)
    return fitted


def agree(found, expected):
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


@cases
@kinds
@pytest.mark.parametrize("inverse", ["cholesky", "dual", "cg"])
def test_the_full_covariance_is_that_of_laplace_torch(network, kind, inverse, laplace):
    model, likelihood, loader, query = problem(network, kind)
    ours = LinearizedLaplace(model, likelihood, prior_precision=DELTA, inverse=inverse).fit(loader)
    theirs = peer(laplace, model, kind, loader, "all")
    mean, covariance = theirs._glm_predictive_distribution(query)
    agree(ours.covariance(query), covariance)
    agree(ours.predict(query).mean, mean)


@cases
@kinds
def test_the_last_layer_covariance_is_that_of_laplace_torch_by_both_routes(network, kind, laplace):
    model, likelihood, loader, query = problem(network, kind)
    closed = LastLayerLaplace(model, likelihood, prior_precision=DELTA).fit(loader)
    linearized = LinearizedLaplace(model, likelihood, prior_precision=DELTA, subset_of_weights="last_layer").fit(loader)
    _, covariance = peer(laplace, model, kind, loader, "last_layer")._glm_predictive_distribution(query)
    agree(closed.covariance(query), covariance)
    agree(linearized.covariance(query), covariance)


@cases
@kinds
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_the_marginal_likelihood_is_that_of_laplace_torch_up_to_its_constants(network, kind, subset, laplace):
    """Differences between two priors: no constant of either density is left in them."""
    model, likelihood, loader, _ = problem(network, kind)
    ours = LinearizedLaplace(model, likelihood, prior_precision=DELTA, subset_of_weights=subset).fit(loader)
    theirs = peer(laplace, model, kind, loader, subset)
    first, second = torch.tensor([0.8]), torch.tensor([6.0])
    expected = (theirs.log_marginal_likelihood(first) - theirs.log_marginal_likelihood(second)).detach()
    found = ours.log_marginal_likelihood(0.8) - ours.log_marginal_likelihood(6.0)
    agree(found, expected)


@cases
def test_probit_probabilities_are_those_of_laplace_torch(network, laplace):
    model, likelihood, loader, query = problem(network, "classification")
    ours = LinearizedLaplace(model, likelihood, prior_precision=DELTA).fit(loader).predict(query)
    expected = peer(laplace, model, "classification", loader, "all")(query, link_approx="probit")
    assert torch.allclose(ours.probs, expected, rtol=1e-6)


class TwoLogits(nn.Module):
    """One logit f as the two logits (0, f): the peer has no Bernoulli likelihood."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        f = self.model(x)
        return torch.cat([torch.zeros_like(f), f], dim=1)


@cases
@pytest.mark.parametrize("inverse", ["cholesky", "dual", "cg"])
def test_the_binary_covariance_is_that_of_a_softmax_over_nothing_and_the_logit(network, inverse, laplace):
    _, _, loader, query = problem(network, "classification")
    model = NETWORKS[network][0](1).eval()
    rows = [(x, (y == 1)) for x, y in loader]
    ours = LinearizedLaplace(model, Bernoulli(), prior_precision=DELTA, inverse=inverse)
    ours.fit([(x, y[:, None].to(x.dtype)) for x, y in rows])
    x, y = (torch.cat(parts) for parts in zip(*rows, strict=True))
    theirs = peer(
        laplace,
        TwoLogits(model),
        "classification",
        DataLoader(TensorDataset(x, y.long()), batch_size=6),
        "all",
    )
    _, covariance = theirs._glm_predictive_distribution(query)
    agree(ours.covariance(query), covariance[:, 1:, 1:])
    assert float(covariance[:, 0].abs().max()) == 0


def without_biases(network, kind):
    model, likelihood, _, query = problem(network, kind)
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.register_parameter("bias", None)
    return model, likelihood, query


@cases
@kinds
def test_kron_of_all_weights_is_that_of_laplace_torch_where_there_are_no_biases(network, kind, laplace):
    model, likelihood, query = without_biases(network, kind)
    (whole,) = DataLoader(problem(network, kind)[2].dataset, batch_size=23)  # it mixes the factors of several batches
    ours = LinearizedLaplace(model, likelihood, prior_precision=DELTA, hessian_structure="kron").fit([whole])
    theirs = peer(laplace, model, kind, DataLoader(problem(network, kind)[2].dataset, batch_size=23), "all", "kron")
    agree(ours.covariance(query), theirs._glm_predictive_distribution(query)[1])


@cases
@kinds
def test_diag_of_all_weights_is_that_of_laplace_torch(network, kind, laplace):
    model, likelihood, loader, query = problem(network, kind)
    ours = LinearizedLaplace(model, likelihood, prior_precision=DELTA, hessian_structure="diag").fit(loader)
    theirs = peer(laplace, model, kind, loader, "all", "diag")
    agree(ours.covariance(query), theirs._glm_predictive_distribution(query)[1])
