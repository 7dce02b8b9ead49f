"""Layers of spectral-normalised neural Gaussian processes: a bound on the norm of a layer, and random features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

__all__ = ["RandomFeatures", "SpectralBound", "bound_layers", "replace_layer", "unbound_layers"]

_WARM_UP = 15
"""Power iterations at the start, as in `torch.nn.utils.parametrizations.spectral_norm`."""


class SpectralBound(nn.Module):
    """The parametrization W ↦ W · min(1, c/σ) with σ the largest singular value of W (Liu et al. 2020, section 3.2).

    W is a matrix of the outputs by all else, for a convolution too. σ is estimated by one power iteration per forward
    pass in train mode.

    Args:
        weight: the weight at the start.
        bound: c.
    """

    left: Tensor
    right: Tensor

    def __init__(self, weight: Tensor, bound: float) -> None:
        super().__init__()
        self.bound = bound
        matrix = weight.detach().flatten(1)
        self.register_buffer("left", F.normalize(torch.randn_like(matrix[:, 0]), dim=0))
        self.register_buffer("right", torch.zeros_like(matrix[0]))
        self._iterate(matrix, _WARM_UP)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with a largest singular value of at most the bound."""
        if self.training:
            self._iterate(weight.detach().flatten(1), 1)
        # Clones: a later iteration would change the tensors that the backward pass needs.
        sigma = self.left.clone() @ (weight.flatten(1) @ self.right.clone())
        return weight * (self.bound / sigma.clamp_min(self.bound))

    @torch.no_grad()
    def _iterate(self, matrix: Tensor, n: int) -> None:
        for _ in range(n):
            self.right.copy_(F.normalize(matrix.T @ self.left, dim=0))
            self.left.copy_(F.normalize(matrix @ self.right, dim=0))


class RandomFeatures(nn.Module):
    """Φ(h) = √(2/D) cos(Ω h + b): E Φ(h)ᵀΦ(h') = exp(−‖h − h'‖²/2ℓ²) (Rahimi and Recht 2007).

    Args:
        n_inputs: the length of h.
        n_features: D.
        lengthscale: ℓ, in units of h.
        seed: the seed of Ω ~ N(0, 1/ℓ²) and b ~ U(0, 2π).
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, n_inputs: int, n_features: int, *, lengthscale: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        frequencies = torch.randn(n_features, n_inputs, generator=generator, dtype=torch.float64) / lengthscale
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("phases", 2 * math.pi * torch.rand(n_features, generator=generator, dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        """Return Φ (..., D) at h (..., E)."""
        return math.sqrt(2 / len(self.phases)) * torch.cos(F.linear(h, self.frequencies, self.phases))


def bound_layers(model: nn.Module, bound: float) -> None:
    """Bound the norm of every linear and convolutional layer whose weight is trained, in place."""
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, _ConvNd)) and layer.weight.requires_grad:
            parametrize.register_parametrization(layer, "weight", SpectralBound(layer.weight, bound))


def unbound_layers(model: nn.Module) -> None:
    """Make the bounded weights those of plain layers, in place, with the norm by a singular value decomposition."""
    for layer in model.modules():
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        (found,) = layer.parametrizations["weight"]  # type: ignore[index]
        if isinstance(found, SpectralBound):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            with torch.no_grad():
                sigma = torch.linalg.matrix_norm(weight.flatten(1), ord=2)
                weight.mul_(found.bound / sigma.clamp_min(found.bound))


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Return the model with another layer of this name; the layer itself if the model is that layer."""
    if not name:
        return layer
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
    return model
