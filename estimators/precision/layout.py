"""Where the linear maps of a network lie in θ, and its rows in factors along the columns of S."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from estimators.layer_rows import LayerRows, Layers
from estimators.linear_uses import LinearMap
from estimators.objective import Objective
from estimators.precision.dtype import widen
from estimators.subsets import Subset

__all__ = ["Layout", "layers_of", "whitened_rows"]


@dataclass(frozen=True)
class Layout:
    """Where the maps and the rest lie in θ."""

    subset: Subset
    maps: dict[str, LinearMap]
    rest: list[str]

    @classmethod
    def of(cls, layers: Layers) -> Layout:
        """Of the maps and the rest that were found."""
        return cls(layers.network.subset, layers.maps, layers.rest)

    def description(self) -> dict[str, Any]:
        """The maps and the rest, in JSON types."""
        return {"maps": [asdict(linear) for linear in self.maps.values()], "rest": self.rest}

    @classmethod
    def described(cls, subset: Subset, description: dict[str, Any]) -> Layout:
        """From `description()`."""
        return cls(
            subset, {content["weight"]: LinearMap(**content) for content in description["maps"]}, description["rest"]
        )

    def matrix(self, theta: Tensor, name: str) -> Tensor:
        """The entries of a map in vectors (..., P), as (..., O, E)."""
        linear, places = self.maps[name], self.subset.slices
        weight: Tensor = theta[..., places[linear.weight]]
        if linear.transposed:  # (D/k, O, k) -> (O, D/k, k)
            weight = weight.unflatten(-1, (-1, linear.n_outputs, linear.n_kernel)).transpose(-3, -2).flatten(-2)
        else:
            weight = weight.unflatten(-1, (linear.n_outputs, -1))
        if linear.bias is None:
            return weight
        return torch.cat([weight, theta[..., places[linear.bias], None]], dim=-1)

    def put(self, theta: Tensor, name: str, matrix: Tensor) -> None:
        """Write (..., O, E) to its entries of vectors (..., P)."""
        linear, places = self.maps[name], self.subset.slices
        weight = matrix[..., : linear.n_inputs]
        if linear.transposed:
            weight = weight.unflatten(-1, (-1, linear.n_kernel)).transpose(-3, -2).flatten(-2)
        theta[..., places[linear.weight]] = weight.flatten(-2)
        if linear.bias is not None:
            theta[..., places[linear.bias]] = matrix[..., -1]

    def rest_of(self, theta: Tensor) -> Tensor:
        """The entries of the rest, (..., P_rest)."""
        return theta[..., self.rest_index]

    @property
    def rest_index(self) -> Tensor:
        """Their places in θ."""
        places = [torch.arange(place.start, place.stop) for place in map(self.subset.slices.__getitem__, self.rest)]
        return torch.cat([torch.arange(0), *places])


def layers_of(objective: Objective) -> Layers:
    """As the first training row shows them."""
    return Layers(objective.network, next(iter(objective.batches)).x)


def whitened_rows(objective: Objective, layers: Layers) -> Iterator[LayerRows]:
    """Along the columns of S, Λ = SSᵀ, at every training row."""

    def root(f: Tensor, y: Tensor) -> Tensor:
        return objective.likelihood.given(y).hessian_sqrt(widen(f)).transpose(1, 2).to(f.dtype)

    for batch in objective.batches:
        yield from layers.at(batch.x, root, batch.y)
