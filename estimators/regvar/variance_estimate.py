"""What a regularizer makes of the displacements: a variance, and what else it can say."""

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
    """Reads variances at queries x from displacements (K, P) ≈ A⁻¹∇r."""

    @abstractmethod
    def variance(self, x: PyTree) -> Tensor:
        """(M, C)."""

    @abstractmethod
    def state(self) -> Learned:
        """Tensors and JSON values that the regularizer's `restored` makes it again from."""

    def covariance(self, x: PyTree) -> Tensor:  # noqa: ARG002
        """(M, C, C)."""
        raise self._unsupported("a covariance between outputs", "Pointwise or PosteriorDraws")

    def sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """Deviations from f(x; θ̂), (n_samples, M, C)."""
        raise self._unsupported("function samples", "PosteriorDraws")

    def standard_error(self, x: PyTree) -> Tensor:  # noqa: ARG002
        """Monte-Carlo standard error of `variance`, (M, C)."""
        raise self._unsupported("a Monte-Carlo error", "SignedProbes, ParameterProbes or PosteriorDraws")

    def through(self, of: Functional) -> VarianceEstimate:  # noqa: ARG002
        """The same displacements, read through g∘f."""
        raise self._unsupported("the variance of a functional", "PosteriorDraws, or Pointwise(of=...)")

    def _unsupported(self, what: str, instead: str) -> UnsupportedError:
        return UnsupportedError(
            f"a regularizer with {what}", received=type(self).__name__, remedy=f"RegVar with {instead}."
        )
