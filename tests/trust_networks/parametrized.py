"""Weights that are functions of parameters."""

import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from trust_networks.case import images, network, vectors


def _mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


@network(vectors())
def weight_norm():
    model = _mlp()
    parametrizations.weight_norm(model[0])
    return model


@network(vectors())
def weight_norm_of_the_head():
    model = _mlp()
    parametrizations.weight_norm(model[2])
    return model


@network(vectors())
def old_weight_norm():
    model = _mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[0])
    return model


@network(vectors())
def spectral_norm():
    model = _mlp()
    parametrizations.spectral_norm(model[0])
    return model


@network(vectors())
def old_spectral_norm():
    model = _mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.spectral_norm(model[0])
    model(torch.randn(3, 4))
    return model


@network(vectors())
def orthogonal():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    parametrizations.orthogonal(model[0])
    return model


@network(vectors())
def orthogonal_by_cayley():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    parametrizations.orthogonal(model[0], orthogonal_map="cayley")
    return model


class _Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).transpose(-1, -2)


class _Positive(nn.Module):
    def forward(self, w):
        return nn.functional.softplus(w)


@network(vectors())
def symmetric_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    parametrize.register_parametrization(model[0], "weight", _Symmetric())
    return model


@network(vectors())
def positive_weight_of_the_head():
    model = _mlp()
    parametrize.register_parametrization(model[2], "weight", _Positive())
    return model


@network(images())
def weight_norm_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 2))
    parametrizations.weight_norm(model[0])
    return model


@network(vectors())
class HypernetworkWeights(nn.Module):
    """The weights of a layer come out of another layer."""

    def __init__(self):
        super().__init__()
        self.make, self.head = nn.Linear(4, 12), nn.Linear(3, 2)

    def forward(self, x):
        weights = self.make(x.flip(1)).view(-1, 3, 4)
        return self.head(torch.tanh(torch.einsum("bij,bj->bi", weights, x)))


@network(vectors())
class LowRankAdapter(nn.Module):
    """A frozen weight plus a trained product of two factors."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)
        self.a.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return self.b(torch.tanh(self.a(x) + x @ self.down.T @ self.up.T))
