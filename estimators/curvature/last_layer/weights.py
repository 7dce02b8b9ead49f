"""The precision of a last layer as a precision over the entries of θ."""

from __future__ import annotations

from torch import Tensor

from estimators.curvature.base import Precision
from estimators.curvature.last_layer.features import LastLayer
from estimators.curvature.last_layer.precision import LastLayerPrecision

__all__ = ["LastLayerWeights"]


class LastLayerWeights(Precision):
    """A over θ (P,), which is the last layer alone, by a precision over the entries (C, E) of the layer."""

    def __init__(self, layer: LastLayer, precision: LastLayerPrecision) -> None:
        self.layer, self.precision = layer, precision

    def solve(self, vectors: Tensor) -> Tensor:
        return self.layer.to_theta(self.precision.solve(self.layer.to_matrix(vectors))).to(vectors.dtype)

    def multiply(self, vectors: Tensor) -> Tensor:
        return self.layer.to_theta(self.precision.multiply(self.layer.to_matrix(vectors))).to(vectors.dtype)

    def covariance(self, jacobian: Tensor) -> Tensor:
        return self.differentiable_covariance(jacobian)

    def marginal_variance(self, theta: Tensor) -> Tensor:
        return self.layer.to_theta(self.precision.marginal_variance()).to(theta.dtype)

    def log_det(self) -> Tensor:
        return self.precision.log_det()
