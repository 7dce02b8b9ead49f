"""Where the linear maps of a network lie in θ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from estimators.models.linear_calls import LinearMap
from estimators.models.subsets import Subset

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Where the maps and the rest lie in θ."""

    subset: Subset
    maps: dict[str, LinearMap]
    rest: list[str]

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
