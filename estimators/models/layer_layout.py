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
    """Where the maps and the other parameters of a network lie in θ.

    Attributes:
        subset: the chosen parameters.
        maps: the linear maps, by the name of their weight.
        other_params: the names of all other parameters.
    """

    subset: Subset
    maps: dict[str, LinearMap]
    other_params: list[str]

    def description(self) -> dict[str, Any]:
        """The maps and the other parameters in JSON types, from which `from_description` makes the layout."""
        return {"maps": [asdict(linear) for linear in self.maps.values()], "other_params": self.other_params}

    @classmethod
    def from_description(cls, subset: Subset, description: dict[str, Any]) -> Layout:
        """The layout of a `description()`."""
        maps = {content["weight"]: LinearMap(**content) for content in description["maps"]}
        return cls(subset, maps, description["other_params"])

    def matrix(self, theta: Tensor, name: str) -> Tensor:
        """The entries of a map in vectors (..., P), as (..., O, E)."""
        linear, slices = self.maps[name], self.subset.slices
        weight: Tensor = theta[..., slices[linear.weight]]
        if linear.transposed:  # (D/k, O, k) -> (O, D/k, k)
            weight = weight.unflatten(-1, (-1, linear.n_outputs, linear.n_kernel)).transpose(-3, -2).flatten(-2)
        else:
            weight = weight.unflatten(-1, (linear.n_outputs, -1))
        if linear.bias is None:
            return weight
        return torch.cat([weight, theta[..., slices[linear.bias], None]], dim=-1)

    def put(self, theta: Tensor, name: str, matrix: Tensor) -> None:
        """Write a matrix (..., O, E) to the entries of a map in vectors (..., P)."""
        linear, slices = self.maps[name], self.subset.slices
        weight = matrix[..., : linear.n_inputs]
        if linear.transposed:
            weight = weight.unflatten(-1, (-1, linear.n_kernel)).transpose(-3, -2).flatten(-2)
        theta[..., slices[linear.weight]] = weight.flatten(-2)
        if linear.bias is not None:
            theta[..., slices[linear.bias]] = matrix[..., -1]

    def other_entries(self, theta: Tensor) -> Tensor:
        """The entries of the other parameters in vectors (..., P), (..., P_other)."""
        return theta[..., self.other_index]

    @property
    def other_index(self) -> Tensor:
        """The indices in θ of the other parameters, (P_other,)."""
        slices = [self.subset.slices[name] for name in self.other_params]
        return torch.cat([torch.arange(0), *(torch.arange(entries.start, entries.stop) for entries in slices)])
