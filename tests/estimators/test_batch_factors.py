"""The factors of a batch by one pass on the module equal those of its rows one at a time, and faults are noticed."""

import pytest
import torch
from torch import nn

from estimators import Gaussian, LinearizedLaplace
from estimators.errors import EstimatorError
from estimators.models import Network, batch_factors
from estimators.models.jacobian_factors import FACTORS
from estimators.models.layer_jacobians import LayerwiseJacobian

N, C = 7, 2


class Attention(nn.Module):
    """A transformer layer, whose attention keeps the rows in the second dimension."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
        self.head = nn.Linear(4, C)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class InPlace(nn.Module):
    """Activations and sums that overwrite the outputs of layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Linear(4, C)

    def forward(self, x):
        h = torch.relu_(self.norm(self.conv(x).sigmoid_()))
        h = h + self.conv(x).tanh_()
        return self.head(h.mean((2, 3)))


class Positions(nn.Module):
    """Positions of all rows in the first dimension, and a layer that no output depends on."""

    def __init__(self):
        super().__init__()
        self.first, self.unused, self.norm, self.head = (
            nn.Linear(3, 4),
            nn.Linear(3, 4),
            nn.LayerNorm(4),
            nn.Linear(4, C),
        )

    def forward(self, x):
        self.unused(x)
        h = torch.tanh(self.first(x.reshape(-1, 3)))
        return self.head(self.norm(h).unflatten(0, x.shape[:2]).sum(1))


class PositionsFirst(nn.Module):
    """Positions of all rows in the first dimension, position after position, as inside attention."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, C)

    def forward(self, x):
        h = self.norm(torch.tanh(self.first(x.transpose(0, 1).reshape(-1, 3))))
        return self.head(h.unflatten(0, (x.shape[1], x.shape[0])).sum(0))


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, C, bias=False)), (3,)),
    "cnn": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            *(nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(48, C)),
        ),
        (2, 4, 4),
    ),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, dilation=2), nn.Tanh(), nn.Flatten(), nn.Linear(9, C)), (2, 7)),
    "transformer": (Attention, (3, 4)),
    "in place": (InPlace, (2, 3, 3)),
    "positions": (Positions, (4, 3)),
    "positions first": (PositionsFirst, (4, 3)),
}
networks = pytest.mark.parametrize("name", NETWORKS)


def made(name, dtype=torch.float64):
    make, shape = NETWORKS[name]
    torch.manual_seed(2)
    model = make().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.normal_()
    return model.eval(), torch.randn(N, *shape, dtype=dtype)


def layers_of(model, x, *, names=None):
    network = Network(model, list(dict(model.named_parameters())) if names is None else names)
    network.record_training_rows(len(x))
    return LayerwiseJacobian(network, x)


def rows(layers, x, u, *, pooled=False):
    with layers.network.check.on_training_rows():
        parts = list(layers.rows_at(x, lambda _, targets: targets, u, n_cotangents=u.shape[1], pooled=pooled))
    joined = {
        name: [torch.cat([getattr(part.factors[name], field) for part in parts]) for field in ("inputs", "gradients")]
        for name in layers.maps
    }
    return joined, torch.cat([part.other_rows for part in parts])


@networks
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_factors_equal_those_of_rows_one_at_a_time(name, pooled, k, monkeypatch):
    model, x = made(name)
    u = torch.randn(N, k, C, dtype=x.dtype)
    layers = layers_of(model, x)
    found, others = rows(layers, x, u, pooled=pooled)
    report = layers.network.check.report
    assert report.routes[FACTORS] == "one backward pass on the module"
    assert report.rows[FACTORS] == N
    monkeypatch.setattr(batch_factors, "_MOST_COTANGENTS", 0)
    slow = layers_of(model, x)
    expected, expected_others = rows(slow, x, u, pooled=pooled)
    assert slow.network.check.report.routes.get(FACTORS) != "one backward pass on the module"
    assert torch.allclose(others, expected_others, rtol=1e-10, atol=1e-12)
    for weight, parts in expected.items():
        for one, other in zip(found[weight], parts, strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@networks
def test_factors_give_the_gradient_of_plain_autograd_at_every_row(name):
    model, x = made(name)
    u = torch.randn(N, 1, C, dtype=x.dtype)
    layers = layers_of(model, x)
    found, others = rows(layers, x, u)
    for i in range(N):
        params = dict(model.named_parameters())
        g = torch.autograd.grad((u[i, 0] * model(x[i : i + 1])[0]).sum(), list(params.values()), allow_unused=True)
        g = {n: torch.zeros_like(params[n]) if v is None else v for n, v in zip(params, g, strict=True)}
        expected = torch.cat([v.flatten() for v in g.values()])
        for weight, (a, b) in found.items():
            matrix = layers.layout.matrix(expected, weight)
            assert torch.allclose(b[i, 0].T @ a[i], matrix, rtol=1e-9, atol=1e-12)
        assert torch.allclose(others[i, 0], layers.layout.other_entries(expected), rtol=1e-9, atol=1e-12)


def test_frozen_parameters_and_state_stay():
    model, x = made("cnn")
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = layers_of(model, x, names=["0.weight", "6.weight", "1.weight"])
    found, _ = rows(layers, x, torch.randn(N, 1, C, dtype=x.dtype))
    assert list(found) == ["0.weight", "6.weight"]
    assert layers.network.check.report.routes[FACTORS] == "one backward pass on the module"
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class HiddenUse(nn.Module):
    """Uses the weight of its layer once more where no linear call shows it."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4).double(), nn.Linear(4, C).double()
        self.alias = [self.first.weight.view(4, 3)]

    def forward(self, x):
        return self.head(torch.tanh(self.first(x))) + (x @ self.alias[0].T).sum(1, keepdim=True)


class Normalised(torch.autograd.Function):
    """The identity, whose gradient is divided by the number of rows."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: ARG004
        ctx.rows = len(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return g / ctx.rows

    @staticmethod
    def vmap(info, in_dims, x):  # noqa: ARG004
        return Normalised.apply(x), in_dims[0]


class DependentGradient(nn.Sequential):
    def forward(self, x):
        return self[1](torch.tanh(Normalised.apply(self[0](x))))


class Reversed(nn.Module):
    """Applies its first layer to the rows in reverse, which its shapes do not show."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x.flip(0))).flip(0).sum(1))


def test_a_hidden_use_of_a_weight_is_an_error():
    torch.manual_seed(0)
    model, x = HiddenUse().eval(), torch.randn(N, 3).double()
    with pytest.raises(EstimatorError):
        LinearizedLaplace(model, Gaussian(0.6), hessian_structure="kron").fit([(x, torch.randn(N, C).double())])


def test_a_gradient_that_depends_on_the_other_rows_is_an_error():
    torch.manual_seed(0)
    model, x = DependentGradient(nn.Linear(3, 4), nn.Linear(4, C)).double().eval(), torch.randn(N, 3).double()
    with pytest.raises(EstimatorError):
        LinearizedLaplace(model, Gaussian(0.6), hessian_structure="kron").fit([(x, torch.randn(N, C).double())])


def test_rows_in_another_order_are_noticed():
    torch.manual_seed(0)
    model, x = Reversed().double().eval(), torch.randn(N, 4, 3).double()
    layers = layers_of(model, x)
    found, _ = rows(layers, x, torch.randn(N, 1, C, dtype=x.dtype), pooled=True)
    assert layers.network.check.report.routes.get(FACTORS) != "one backward pass on the module"
    assert torch.allclose(found["first.weight"][0][:, :, :3], x.mean(1, keepdim=True), rtol=1e-12, atol=0)


@pytest.mark.parametrize("fault", ["inputs", "gradient", "one row"])
def test_wrong_factors_are_replaced(fault, monkeypatch):
    """Factors with an error in any place are noticed, and those of rows one at a time are used."""
    model, x = made("cnn")
    u = torch.randn(N, 1, C, dtype=x.dtype)
    expected, _ = rows(layers_of(model, x), x, u)
    plain = batch_factors._gradient

    def wrong(call, gradient, n):
        found = plain(call, gradient, n).clone()
        if call.map.weight == "0.weight":
            found[slice(None) if fault == "gradient" else n - 1] *= 1.001
        return found

    if fault == "inputs":
        order = batch_factors.BatchLinearCall.by_position
        monkeypatch.setattr(batch_factors.BatchLinearCall, "by_position", lambda *given: order(*given).flip(1))
    else:
        monkeypatch.setattr(batch_factors, "_gradient", wrong)
    layers = layers_of(model, x)
    found, _ = rows(layers, x, u)
    assert layers.network.check.report.routes.get(FACTORS) != "one backward pass on the module"
    for weight, parts in expected.items():
        for one, other in zip(found[weight], parts, strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_float32_agrees_within_its_round_off():
    model, x = made("cnn", torch.float32)
    layers = layers_of(model, x)
    rows(layers, x, torch.randn(N, 1, C))
    report = layers.network.check.report
    assert report.routes[FACTORS] == "one backward pass on the module"
    assert 0 < report.largest_error[FACTORS] < 1e-4
