"""The base class of Gaussian posteriors over weights with a linearized network: variance, covariance and samples."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from estimators.curvature.base import Precision
from estimators.estimator.base import UncertaintyEstimator
from estimators.models.functionals import ComposedNetwork, Functional
from estimators.numerics.pytrees import PyTree

__all__ = ["LinearizedPosterior"]


class LinearizedPosterior(UncertaintyEstimator):
    """An estimator with covariance(x) = J A⁻¹ Jᵀ and samples f + J u, u ~ N(0, A⁻¹).

    Subclasses set `precision_` in `_fit`, or override `_precision_at`, and implement `_displacements`.

    Attributes:
        precision_: the posterior precision A.
    """

    precision_: Precision

    def _precision_at(self, x: PyTree) -> Precision:  # noqa: ARG002
        """Return A for queries x."""
        return self.precision_

    @abstractmethod
    def _displacements(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return samples u ~ N(0, A⁻¹), (n_samples, P)."""

    def _variance(self, x: PyTree) -> Tensor:
        return self._precision_at(x).variance_at(self.network_, x)

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        return self._precision_at(x).variance_at(ComposedNetwork(self.network_, of), x)

    def _covariance(self, x: PyTree) -> Tensor:
        return self._precision_at(x).covariance_at(self.network_, x)

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        return self.network_.outputs(x) + self.network_.jvp(x, self._displacements(n_samples, generator))
