"""The interface of a posterior precision."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

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

    def variance(self, jacobian: Tensor) -> Tensor:
        """The diagonal of `covariance`, (M, C)."""
        return self.covariance(jacobian).diagonal(dim1=-2, dim2=-1)
