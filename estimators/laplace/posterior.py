"""The base class of Gaussian posteriors over weights with a linearized network: variance, covariance and samples."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from estimators.curvature.base import Precision
from estimators.estimator.base import UncertaintyEstimator
from estimators.estimator.weight_space import check_jacobian_fits
from estimators.models.functionals import ComposedNetwork, Functional
from estimators.numerics.pytrees import PyTree

__all__ = ["LinearizedPosterior"]


class LinearizedPosterior(UncertaintyEstimator):
    """An estimator with covariance(x) = J A⁻¹ Jᵀ and samples f + J u, u ~ N(0, A⁻¹).

    Subclasses set `precision_` in `_fit`, or override `_precision_at`, and implement `_weight_displacements`.

    Attributes:
        precision_: the posterior precision A.
    """

    precision_: Precision

    def _precision_at(self, x: PyTree) -> Precision:  # noqa: ARG002
        """Return A for queries x."""
        return self.precision_

    def _weight_precision(self) -> Precision:
        return self.precision_

    @abstractmethod
    def _weight_displacements(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Return samples u ~ N(0, A⁻¹), (n_samples, P)."""

    def _variance(self, x: PyTree) -> Tensor:
        return self._precision_at(x).variance_at(self.network_, x)

    def _variance_of(self, x: PyTree, of: Functional) -> Tensor:
        return self._precision_at(x).variance_at(ComposedNetwork(self.network_, of), x)

    def _covariance(self, x: PyTree) -> Tensor:
        return self._precision_at(x).covariance_at(self.network_, x)

    def _joint_covariance(self, x: PyTree, f: Tensor) -> Tensor:
        check_jacobian_fits(self.network_, *f.shape)
        found = self._precision_at(x).joint_covariance_at(self.network_, x)
        return super()._joint_covariance(x, f) if found is None else found

    def _sample(self, x: PyTree, n_samples: int, generator: torch.Generator) -> Tensor:
        return self.network_.outputs(x) + self.network_.jvp(x, self._weight_displacements(n_samples, generator))
