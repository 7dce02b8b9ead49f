"""laplace-torch behind our interface: right where it is right, rejected where a measurement shows that it is not."""

import sys

import pytest
import torch
from torch import nn

from estimators import Gaussian, LastLayerLaplace, LinearizedLaplace
from estimators.baselines import LaplaceTorch
from estimators.errors import OptionError, UnsupportedError
from estimators.runtime.rng import preserved_random_state

DELTA, SIGMA = 2.5, 0.5


def problem(kind, dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(3)
    outputs = 2 if kind == "regression" else 3
    with preserved_random_state():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, outputs, bias=bias)).to(dtype).eval()
    x = torch.randn(23, 4, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(23, 2, generator=generator, dtype=torch.float64).to(dtype)
    y = y if kind == "regression" else torch.randint(0, 3, (23,), generator=generator)
    likelihood = Gaussian(SIGMA) if kind == "regression" else kind
    query = torch.randn(5, 4, generator=generator, dtype=torch.float64).to(dtype)
    return model, likelihood, [(x[i : i + 9], y[i : i + 9]) for i in (0, 9, 18)], query


def agree(found, expected, tolerance=1e-6):
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize(
    ("subset", "structure", "backend"),
    [
        ("all", "full", "CurvlinopsGGN"),
        ("all", "diag", "CurvlinopsGGN"),
        ("all", "kron", "CurvlinopsGGN"),
        ("all", "full", "BackPackGGN"),
        ("last_layer", "full", "CurvlinopsGGN"),
        ("last_layer", "kron", "CurvlinopsGGN"),
        ("last_layer", "diag", "CurvlinopsGGN"),
    ],
)
def test_it_agrees_where_it_is_right(kind, subset, structure, backend):
    model, likelihood, loader, x = problem(kind, bias=structure != "kron")
    options = {"prior_precision": DELTA, "hessian_structure": structure}
    theirs = LaplaceTorch(model, likelihood, subset_of_weights=subset, backend=backend, **options).fit(loader)
    if subset == "all":
        ours = LinearizedLaplace(model, likelihood, **options).fit(loader)
    else:
        ours = LastLayerLaplace(model, likelihood, **options).fit(loader)
    agree(theirs.covariance(x), ours.covariance(x))
    agree(theirs.variance(x), ours.variance(x))
    agree(theirs.predict(x).mean, ours.predict(x).mean)


def test_the_model_and_the_default_dtype_are_left_as_they_were():
    model, likelihood, loader, x = problem("classification", torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = LaplaceTorch(model, likelihood, backend="BackPackGGN", hessian_structure="full").fit(loader)
    assert fitted.variance(x).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or hasattr(module, "input0") for module in model.modules())


@pytest.mark.filterwarnings("ignore")
def test_the_empirical_fisher_in_regression_is_off_by_twice_the_noise_variance():
    """What is rejected, measured: at one row, the Fisher of a Gaussian is the outer product of the slope of −log p."""
    model, likelihood, loader, _ = problem("regression")
    with pytest.raises(OptionError, match="2σ² times"):
        LaplaceTorch(model, likelihood, backend="BackPackEF")
    laplace = pytest.importorskip("laplace")
    x, y = loader[0][0][:1], loader[0][1][:1]
    torch.set_default_dtype(torch.float64)
    try:
        theirs = laplace.Laplace(
            model, "regression", "all", "full", sigma_noise=SIGMA, backend=laplace.curvature.BackPackEF
        )
        theirs.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y)))
    finally:
        torch.set_default_dtype(torch.float32)
    loss = ((model(x) - y).square() / (2 * SIGMA**2)).sum()
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    ratio = float((theirs.H * theirs._H_factor).norm() / slope.outer(slope).norm())
    assert ratio == pytest.approx(2 * SIGMA**2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hessian_structure": "gp"}, "transposes"),
        ({"hessian_structure": "lowrank"}, "no longer exists"),
        ({"hessian_structure": "blocks"}, "hessian_structure 'full' or"),
        ({"backend": "Autograd"}, "backend 'CurvlinopsGGN' or"),
        ({"subset_of_weights": "0.*"}, "subset_of_weights 'all' or"),
        ({"prior_precision": {"*": 1.0}}, "mapping"),
        (
            {"backend": "CurvlinopsEF", "subset_of_weights": "last_layer", "hessian_structure": "diag"},
            "returns the prior",
        ),
    ],
)
def test_wrong_or_missing_options_are_rejected_by_name(options, says):
    with pytest.raises(OptionError, match=says):
        LaplaceTorch(nn.Linear(2, 3), "classification", **options)
    with pytest.raises(OptionError, match="one sigma_noise"):
        LaplaceTorch(nn.Linear(2, 3), Gaussian(torch.tensor([0.1, 0.2, 0.3])))
    with pytest.raises(UnsupportedError, match="Bernoulli"):
        LaplaceTorch(nn.Linear(2, 1), "binary")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        h = self.first(x)[:, None]
        return self.last((h + self.attention(h, h, h)[0])[:, 0])


def test_unsupported_networks_raise_with_the_error_of_the_library():
    _, _, loader, _ = problem("classification", torch.float32)
    with pytest.raises(UnsupportedError, match=r"it raises \w+"):
        LaplaceTorch(Residual().eval(), "classification", hessian_structure="full", backend="BackPackGGN").fit(loader)
    partly_frozen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).eval()
    partly_frozen[0].requires_grad_(False)
    with pytest.raises(UnsupportedError, match="grad are switched off"):
        LaplaceTorch(partly_frozen, "classification", hessian_structure="full", backend="BackPackGGN").fit(loader)


def test_an_installation_that_cannot_be_imported_is_named(monkeypatch):
    model, likelihood, loader, _ = problem("classification")
    monkeypatch.setitem(sys.modules, "laplace", None)
    with pytest.raises(UnsupportedError, match="torchvision that matches"):
        LaplaceTorch(model, likelihood).fit(loader)
