"""The interface of a posterior precision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from estimators.models.network import Network
from estimators.numerics.dtype import algebra_dtype, to_algebra_dtype
from estimators.numerics.pytrees import PyTree, split_rows
from estimators.runtime.memory import rows_per_chunk

__all__ = ["Precision", "standard_normal"]


class Precision(ABC):
    """A posterior precision A (P, P), symmetric positive definite, and products with its inverse."""

    @abstractmethod
    def solve(self, vectors: Tensor) -> Tensor:
        """A⁻¹ v (K, P) for vectors v (K, P)."""

    @abstractmethod
    def multiply(self, vectors: Tensor) -> Tensor:
        """A v (K, P) for vectors v (K, P)."""

    @abstractmethod
    def covariance(self, jacobian: Tensor) -> Tensor:
        """J A⁻¹ Jᵀ (M, C, C) for a Jacobian J (M, C, P)."""

    @abstractmethod
    def log_det(self) -> Tensor:
        """log |A|, a scalar."""

    def variance(self, jacobian: Tensor) -> Tensor:
        """The diagonal (M, C) of J A⁻¹ Jᵀ for a Jacobian J (M, C, P)."""
        return self.covariance(jacobian).diagonal(dim1=-2, dim2=-1)

    def differentiable_covariance(self, jacobian: Tensor) -> Tensor:
        """J A⁻¹ Jᵀ (M, C, C) with a graph, for a Jacobian J (M, C, P) with a graph."""
        m, c, p = jacobian.shape
        rows = to_algebra_dtype(jacobian).reshape(m * c, p)
        solved: Tensor = _Solve.apply(rows, self)
        return (rows.view(m, c, p) @ solved.view(m, c, p).transpose(1, 2)).to(jacobian.dtype)

    def marginal_variance(self, theta: Tensor) -> Tensor:
        """The diagonal (P,) of A⁻¹, in the dtype of θ (P,)."""
        parts = torch.arange(len(theta), device=theta.device).split(rows_per_chunk(4 * theta.numel() * 8))
        return torch.cat([self.variance(_unit_vectors(part, theta)[:, None])[:, 0] for part in parts])

    def variance_at(self, network: Network, x: PyTree) -> Tensor:
        """The diagonal (M, C) of J A⁻¹ Jᵀ at M rows x."""
        return torch.cat([self.variance(jacobian) for jacobian in _jacobians(network, x)])

    def covariance_at(self, network: Network, x: PyTree) -> Tensor:
        """J A⁻¹ Jᵀ (M, C, C) at M rows x."""
        return torch.cat([self.covariance(jacobian) for jacobian in _jacobians(network, x)])

    def joint_covariance_at(self, network: Network, x: PyTree) -> Tensor | None:  # noqa: ARG002
        """J A⁻¹ Jᵀ (M, C, M, C) between M rows x; None if there is no cheaper way than from their Jacobian."""
        return None


class _Solve(torch.autograd.Function):
    """v → A⁻¹ v (K, P). The map is linear and symmetric, so that its derivative is the map itself, to any order."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, precision: Precision) -> Tensor:  # noqa: ANN401
        ctx.precision = precision
        return precision.solve(vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        return _Solve.apply(gradients[0], ctx.precision), None


def _unit_vectors(index: Tensor, theta: Tensor) -> Tensor:
    """The unit vectors (n, P) at some indices of θ (P,)."""
    return torch.zeros(len(index), len(theta), dtype=theta.dtype, device=theta.device).scatter_(1, index[:, None], 1.0)


def _jacobians(network: Network, x: PyTree) -> Iterator[Tensor]:
    """J (m, C, P), a chunk of rows at a time."""
    n_outputs = network.outputs(x).shape[-1]
    bytes_per_row = 4 * n_outputs * network.n_parameters * algebra_dtype(network.theta.device).itemsize
    for part in split_rows(x, rows_per_chunk(bytes_per_row)):
        yield network.jacobian(part)


def standard_normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the dtype and on the device of `like`."""
    return torch.randn(*shape, generator=generator, dtype=like.dtype, device=like.device)
