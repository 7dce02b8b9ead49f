"""Kronecker structures of every kind of convolution equal those of the same function by patches and nn.Linear."""

import itertools

import pytest
import torch
from torch import nn

from estimators import Gaussian, LinearizedLaplace
from estimators.errors import DiagonalWeightsWarning
from estimators.models import Network
from estimators.models.layer_jacobians import LayerwiseJacobian

F64 = torch.float64


class AsLinear(nn.Module):
    """A convolution by loops: the patch of each output position, by slices, into an nn.Linear."""

    def __init__(self, layer):
        super().__init__()
        self.transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        n = layer.weight.ndim - 2
        self.layer = [layer]  # in a list, so that its weights are none of this module's
        weight = layer.weight.detach()
        if self.transposed:
            weight = weight.transpose(0, 1).flip(list(range(2, 2 + n)))
        self.linear = nn.Linear(weight[0].numel(), len(weight), bias=layer.bias is not None).to(weight.dtype)
        self.linear.weight.data = weight.flatten(1).clone()
        if layer.bias is not None:
            self.linear.bias.data = layer.bias.detach().clone()

    def spread(self, x):
        """The image that the kernel moves over."""
        (layer,) = self.layer
        kernel, dilation = layer.kernel_size, layer.dilation
        sizes, starts, steps = [], [], []
        for dim, size in enumerate(x.shape[2:]):
            reach = dilation[dim] * (kernel[dim] - 1)
            if self.transposed:
                start, step = reach - layer.padding[dim], layer.stride[dim]
                length = (size - 1) * step + 1 + 2 * start + layer.output_padding[dim]
            else:
                same = layer.padding == "same"
                start = reach // 2 if same else 0 if layer.padding == "valid" else layer.padding[dim]
                step, length = 1, size + (reach if same else 2 * start)
            sizes.append(length)
            starts.append(start)
            steps.append(step)
        image = x.new_zeros(*x.shape[:2], *sizes)
        for place in itertools.product(*map(range, x.shape[2:])):
            to = [s + i * step for s, i, step in zip(starts, place, steps, strict=True)]
            if all(0 <= t < size for t, size in zip(to, sizes, strict=True)):
                image[(slice(None), slice(None), *to)] = x[(slice(None), slice(None), *place)]
        return image

    def forward(self, x):
        (layer,) = self.layer
        image = self.spread(x)
        stride = (1,) * len(layer.kernel_size) if self.transposed else layer.stride
        axes = zip(image.shape[2:], layer.kernel_size, layer.dilation, stride, strict=True)
        counts = [(size - d * (k - 1) - 1) // s + 1 for size, k, d, s in axes]
        patches = []
        for place in itertools.product(*map(range, counts)):
            window = [
                slice(i * s, i * s + d * (k - 1) + 1, d)
                for i, s, d, k in zip(place, stride, layer.dilation, layer.kernel_size, strict=True)
            ]
            patches.append(image[(slice(None), slice(None), *window)].flatten(1))
        return self.linear(torch.stack(patches, 1)).transpose(1, 2).unflatten(2, counts)


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1, stride=2), (2, 7)),
    "conv1d, dilated, no bias": (lambda: nn.Conv1d(2, 3, 2, dilation=3, bias=False), (2, 7)),
    "conv1d, same": (lambda: nn.Conv1d(2, 3, 3, padding="same", dilation=2), (2, 5)),
    "conv1d, valid": (lambda: nn.Conv1d(2, 3, 2, padding="valid"), (2, 5)),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(1, 2)), (2, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (3, 2), padding=(1, 0), stride=(2, 1), dilation=(1, 2)), (2, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 1, 3), padding=(1, 0, 1), stride=(1, 2, 1)), (2, 3, 3, 4)),
    "conv3d, same": (lambda: nn.Conv3d(1, 2, (1, 3, 1), padding="same"), (1, 2, 3, 2)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 4)),
    "transposed 1d, cropped": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=1, padding=2), (2, 6)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 3, (2, 3), stride=(1, 2), dilation=(2, 1), bias=False), (2, 3, 2)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1), padding=(0, 1, 0)), (2, 2, 2, 2)),
}
layers = pytest.mark.parametrize("name", LAYERS)


def pair(name, n=5):
    """The network, the same function with an nn.Linear in place of the convolution, and rows with targets."""
    make, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(3)
    layer = make().double()
    x = torch.randn(n, *shape, generator=generator, dtype=F64)
    head = nn.Linear(layer(x).flatten(1).shape[1], 2).double()
    y = torch.randn(n, 2, generator=generator, dtype=F64)
    models = [nn.Sequential(body, nn.Tanh(), nn.Flatten(), head).eval() for body in (layer, AsLinear(layer))]
    return *models, x, y


def fitted(model, x, y, structure, **options):
    estimator = LinearizedLaplace(model, Gaussian(0.6), prior_precision=1.7, hessian_structure=structure, **options)
    return estimator.fit([(x[:3], y[:3]), (x[3:], y[3:])])


@layers
def test_the_loops_are_the_convolution(name):
    model, reference, x, _ = pair(name)
    assert torch.allclose(model(x), reference(x), rtol=1e-12, atol=1e-12)


@layers
@pytest.mark.parametrize("structure", ["kron", "ekfac", "diag"])
def test_the_structure_is_that_of_the_same_function_by_patches(name, structure):
    model, reference, x, y = pair(name)
    found, expected = fitted(model, x, y, structure), fitted(reference, x, y, structure)
    assert structure == "diag" or found.diagonal_weights_ == []
    assert torch.allclose(found.variance(x), expected.variance(x), rtol=1e-10, atol=0)
    assert torch.allclose(found.covariance(x), expected.covariance(x), rtol=1e-10, atol=1e-13)
    marginal = found.log_marginal_likelihood(), expected.log_marginal_likelihood()
    assert torch.allclose(*marginal, rtol=1e-10)


@layers
def test_the_factors_are_the_jacobian_of_the_weight(name):
    model, _, x, _ = pair(name)
    network = Network(model, [n for n, _ in model.named_parameters()])
    found = LayerwiseJacobian(network, x)
    assert list(found.maps) == ["0.weight", "3.weight"]
    from estimators.models.layer_layout import Layout

    layout, (rows,) = Layout.of(found), list(found.at(x))
    jacobian = torch.zeros(5, 2, network.n_parameters, dtype=F64)
    for weight, factors in rows.factors.items():
        layout.put(jacobian, weight, factors.jacobians())
    assert torch.allclose(jacobian, network.jacobian(x), rtol=1e-10, atol=1e-12)
    matrix = layout.matrix(network.theta, "0.weight")
    again = torch.zeros_like(network.theta)
    layout.put(again, "0.weight", matrix)
    seen = again != 0
    assert torch.equal(again[seen], network.theta[seen])


@layers
def test_the_full_posterior_through_factors_is_exact(name):
    model, _, x, y = pair(name)
    dense = fitted(model, x, y, "full", inverse="cholesky")
    streamed = fitted(model, x, y, "full", inverse="streamed")
    assert torch.allclose(streamed.covariance(x), dense.covariance(x), rtol=1e-9, atol=1e-12)


class Frames(nn.Module):
    """A convolution over the frames of a row, folded into the batch."""

    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Linear(3, 2)

    def forward(self, x):
        frames = torch.tanh(self.body(x.flatten(0, 1)))
        return self.head(frames.flatten(2).mean(2).unflatten(0, x.shape[:2]).mean(1))


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_images_folded_into_the_batch_count_as_positions(structure):
    layer = nn.Conv2d(2, 3, 2).double()
    x, y = torch.randn(5, 4, 2, 3, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
    model, reference = Frames(layer).double().eval(), Frames(AsLinear(layer)).double().eval()
    reference.head = model.head
    found, expected = fitted(model, x, y, structure), fitted(reference, x, y, structure)
    assert torch.allclose(found.variance(x), expected.variance(x), rtol=1e-10)


def grouped():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double().eval()
    return model, torch.randn(5, 4, 5, dtype=F64), torch.randn(5, 2, dtype=F64)


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_weights_of_which_the_diagonal_alone_is_kept_are_named(structure):
    model, x, y = grouped()
    with pytest.warns(DiagonalWeightsWarning, match=r"no Kronecker factors for 0\.weight"):
        estimator = fitted(model, x, y, structure)
    assert estimator.diagonal_weights_ == ["0.weight", "0.bias"]
    full = fitted(model, x, y, "full", inverse="cholesky").data_curvature_.matrix.diagonal()
    kept = estimator.data_curvature_.rest_diagonal
    assert torch.allclose(kept, full[: len(kept)], rtol=1e-10)


class ByMatmul(nn.Module):
    """A weight that enters by a product that is not known, positions that are added, an embedding, a norm."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(5, 4), nn.Parameter(torch.randn(3, 4))
        self.weight, self.norm, self.head = nn.Parameter(torch.randn(4, 4)), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(torch.tanh(self.norm(self.embedding(tokens) + self.positions) @ self.weight).mean(1))


def test_products_of_no_known_kind_are_named_and_what_embeds_shifts_or_scales_is_not():
    model = ByMatmul().double().eval()
    x, y = torch.randint(0, 5, (5, 3)), torch.randn(5, 2, dtype=F64)
    with pytest.warns(DiagonalWeightsWarning, match=r"no Kronecker factors for weight:"):
        estimator = fitted(model, x, y, "kron")
    assert set(estimator.diagonal_weights_) == {
        "embedding.weight",
        "positions",
        "weight",
        "norm.weight",
        "norm.bias",
    }
