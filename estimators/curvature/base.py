"""The interface of a posterior precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from estimators.models.network import Network
from estimators.numerics.dtype import algebra_dtype
from estimators.numerics.pytrees import PyTree, split_rows
from estimators.runtime.memory import rows_per_chunk

__all__ = ["Precision", "standard_normal"]


class Precision(ABC):
    """A posterior precision A (P, P), symmetric positive definite, and products with its inverse."""

    @abstractmethod
    def solve(self, vectors: Tensor) -> Tensor:
        """A⁻¹ v (K, P) for vectors v (K, P)."""

    @abstractmethod
    def covariance(self, jacobian: Tensor) -> Tensor:
        """J A⁻¹ Jᵀ (M, C, C) for a Jacobian J (M, C, P)."""

    @abstractmethod
    def log_det(self) -> Tensor:
        """log |A|, a scalar."""

    def variance(self, jacobian: Tensor) -> Tensor:
        """The diagonal (M, C) of J A⁻¹ Jᵀ for a Jacobian J (M, C, P)."""
        return self.covariance(jacobian).diagonal(dim1=-2, dim2=-1)

    def variance_at(self, network: Network, x: PyTree) -> Tensor:
        """The diagonal (M, C) of J A⁻¹ Jᵀ at M rows x."""
        return torch.cat([self.variance(jacobian) for jacobian in _jacobians(network, x)])

    def covariance_at(self, network: Network, x: PyTree) -> Tensor:
        """J A⁻¹ Jᵀ (M, C, C) at M rows x."""
        return torch.cat([self.covariance(jacobian) for jacobian in _jacobians(network, x)])


def _jacobians(network: Network, x: PyTree) -> Iterator[Tensor]:
    """J (m, C, P), a chunk of rows at a time."""
    n_outputs = network.outputs(x).shape[-1]
    bytes_per_row = 4 * n_outputs * network.n_parameters * algebra_dtype(network.theta.device).itemsize
    for part in split_rows(x, rows_per_chunk(bytes_per_row)):
        yield network.jacobian(part)


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the dtype and on the device of `like`."""
    return torch.randn(*shape, generator=generator, dtype=like.dtype, device=like.device)
