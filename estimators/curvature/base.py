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

__all__ = ["Precision"]


class Precision(ABC):
    """A (P, P), symmetric positive definite, and products with its inverse."""

    @abstractmethod
    def solve(self, vectors: Tensor) -> Tensor:
        """A⁻¹ v for each of vectors (K, P): (K, P)."""

    @abstractmethod
    def covariance(self, jacobian: Tensor) -> Tensor:
        """J A⁻¹ Jᵀ, (M, C, C), of jacobian (M, C, P)."""

    @abstractmethod
    def log_det(self) -> Tensor:
        """log |A|."""

    def variance_at(self, network: Network, x: PyTree) -> Tensor:
        """diag J A⁻¹ Jᵀ at the rows of x, (M, C)."""
        return torch.cat([self.variance(jacobian) for jacobian in _jacobians(network, x)])

    def covariance_at(self, network: Network, x: PyTree) -> Tensor:
        """J A⁻¹ Jᵀ at the rows of x, (M, C, C)."""
        return torch.cat([self.covariance(jacobian) for jacobian in _jacobians(network, x)])

    def variance(self, jacobian: Tensor) -> Tensor:
        """The diagonal of `covariance`, (M, C)."""
        return self.covariance(jacobian).diagonal(dim1=-2, dim2=-1)


def _jacobians(network: Network, x: PyTree) -> Iterator[Tensor]:
    """J (m, C, P) of a few rows at a time."""
    n_outputs = network.outputs(x).shape[-1]
    a_row = 4 * n_outputs * network.n_parameters * algebra_dtype(network.theta.device).itemsize
    for part in split_rows(x, rows_per_chunk(a_row)):
        yield network.jacobian(part)
