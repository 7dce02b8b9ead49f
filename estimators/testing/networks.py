"""The kit's networks as modules, and as formulas in numpy with their Jacobians."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["Array", "Dense", "FirstAndThird", "WithDict"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Dense:
    """f = W₂ tanh(W₁x + b₁) + b₂, or f = Wx + b without a hidden layer; θ in the order of the module's parameters.

    weights: (W, b) or (W₁, b₁, W₂, b₂).
    """

    weights: tuple[Array, ...]

    @classmethod
    def drawn(cls, inputs: int, outputs: int, *, hidden: int | None = None, seed: int = 0) -> Dense:
        """Return a network with normal weights of standard deviation 0.5 and biases of 0.3."""
        rng = np.random.default_rng(seed)
        sizes = [(outputs, inputs)] if hidden is None else [(hidden, inputs), (outputs, hidden)]
        pairs = [(0.5 * rng.normal(size=shape), 0.3 * rng.normal(size=shape[0])) for shape in sizes]
        return cls(tuple(array for pair in pairs for array in pair))

    def module(self, dtype: torch.dtype) -> nn.Sequential:
        """Return a new module in eval mode: linear layers with a tanh between them."""
        layers: list[nn.Module] = []
        for weight, bias in self.pairs:
            layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weight))
                layer.bias.copy_(torch.from_numpy(bias))
            layers += [layer] if not layers else [nn.Tanh(), layer]
        return nn.Sequential(*layers).eval()

    @property
    def pairs(self) -> list[tuple[Array, Array]]:
        """(W, b) of each layer."""
        return list(zip(self.weights[::2], self.weights[1::2], strict=True))

    def at_step(self, step: Array) -> Dense:
        """Return the network with the weights θ + step, (P,)."""
        parts = np.split(step, np.cumsum([w.size for w in self.weights])[:-1])
        return Dense(tuple(w + part.reshape(w.shape) for w, part in zip(self.weights, parts, strict=True)))

    @property
    def last(self) -> NDArray[np.bool_]:
        """Whether an entry of θ belongs to the last layer, (P,)."""
        sizes = [w.size for w in self.weights]
        return np.repeat(np.arange(len(sizes)) >= len(sizes) - 2, sizes)

    @property
    def biases(self) -> NDArray[np.bool_]:
        """Whether an entry of θ belongs to a bias, (P,)."""
        return np.repeat([w.ndim == 1 for w in self.weights], [w.size for w in self.weights])

    def features(self, x: Array) -> Array:
        """Return the features of the last layer, (N, H)."""
        if len(self.weights) == 2:
            return x
        return np.tanh(x @ self.weights[0].T + self.weights[1])

    def outputs(self, x: Array) -> Array:
        """Return f (N, C)."""
        return self.features(x) @ self.weights[-2].T + self.weights[-1]

    def jacobian(self, x: Array) -> Array:
        """Return ∂f/∂θ (N, C, P)."""
        last_weight = self.weights[-2]
        eye = np.eye(len(last_weight))
        h = self.features(x)
        by_weight = np.einsum("cd,nj->ncdj", eye, h).reshape(len(x), len(last_weight), -1)
        last = [by_weight, np.broadcast_to(eye, (len(x), *eye.shape))]
        if len(self.weights) == 2:
            return np.concatenate(last, axis=-1)
        slope = last_weight[None] * (1 - h**2)[:, None, :]  # ∂f_c/∂(W₁x + b₁)_k, (N, C, H)
        first = np.einsum("nck,nj->nckj", slope, x).reshape(len(x), len(last_weight), -1)
        return np.concatenate([first, slope, *last], axis=-1)


class WithDict(nn.Module):
    """A network with two named inputs, like a Hugging Face model: f(features + shift)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor, shift: Tensor) -> Tensor:
        """Return f (B, C)."""
        output: Tensor = self.network(features + shift)
        return output


class FirstAndThird(nn.Module):
    """A network with three outputs, the second of which is always 0."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        """Return f (B, 3)."""
        output: Tensor = self.network(x)
        return output * self.get_buffer("mask").to(output.dtype)
