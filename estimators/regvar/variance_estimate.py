"""The interface of a variance estimate: what a regularizer computes from the displacements of a solver."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from estimators.errors import UnsupportedError
from estimators.models.functionals import Functional
from estimators.numerics.pytrees import PyTree
from estimators.persistence.state import Learned

__all__ = ["VarianceEstimate"]


class VarianceEstimate(ABC):
    """Computes variances at queries x from displacements u ≈ A⁻¹∇r, (K, P).

    M query rows, C outputs. Methods that an estimate does not have raise UnsupportedError.
    """

    @abstractmethod
    def variance(self, x: PyTree) -> Tensor:
        """Return the epistemic variance of the outputs at x, (M, C)."""

    @abstractmethod
    def state(self) -> Learned:
        """Return tensors and JSON values from which `Regularizer.restore_estimate` rebuilds this estimate."""

    def covariance(self, x: PyTree) -> Tensor:  # noqa: ARG002
        """Return the covariance between the outputs of each row of x, (M, C, C)."""
        raise self._unsupported("a covariance between outputs", "Pointwise or PosteriorDraws")

    def sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Return samples of f(x) − f(x; θ̂), (n_samples, M, C)."""
        raise self._unsupported("function samples", "PosteriorDraws")

    def standard_error(self, x: PyTree) -> Tensor:  # noqa: ARG002
        """Return the Monte Carlo standard error of `variance`, (M, C)."""
        raise self._unsupported("a Monte Carlo error", "SignedProbes, ParameterProbes or PosteriorDraws")

    def compose(self, of: Functional) -> VarianceEstimate:  # noqa: ARG002
        """Return the estimate for g∘f, computed from the same displacements; `of` is g."""
        raise self._unsupported("the variance of a functional", "PosteriorDraws, or Pointwise(of=...)")

    def _unsupported(self, what: str, instead: str) -> UnsupportedError:
        return UnsupportedError(
            f"a regularizer with {what}", received=type(self).__name__, remedy=f"RegVar with {instead}."
        )
