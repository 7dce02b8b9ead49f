"""Rows of the Jacobian J = ∂f/∂θ as factors of each linear map: inputs a, and gradients b by its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from estimators.errors import UnsupportedError

__all__ = ["FACTORS", "JacobianFactors", "LayerwiseRows", "rows_differ"]

FACTORS = "factors of layers"
"""Name of the comparison of the factors in the report."""


@dataclass(frozen=True)
class JacobianFactors:
    """Factors of the Jacobian of one linear map at M rows.

    Attributes:
        inputs: a (M, T, E), with a 1 appended for a bias.
        gradients: b (M, K, T, O), by the output of the map, of K cotangents each.
    """

    inputs: Tensor
    gradients: Tensor

    @classmethod
    def joined(cls, parts: Sequence[JacobianFactors]) -> Self:
        """The factors of all rows of several parts."""
        return cls(torch.cat([part.inputs for part in parts]), torch.cat([part.gradients for part in parts]))

    def to(self, dtype: torch.dtype) -> JacobianFactors:
        """The factors in another dtype."""
        return JacobianFactors(self.inputs.to(dtype), self.gradients.to(dtype))

    def at_single_position(self) -> JacobianFactors:
        """Return the factors themselves after checking that T = 1.

        Raises:
            UnsupportedError: the map is applied to several positions of a row.
        """
        if self.inputs.shape[1] != 1:
            raise rows_differ(f"rows that apply one to {self.inputs.shape[1]} positions")
        return self

    def pooled(self) -> JacobianFactors:
        """One position instead of T: the mean of the inputs, and the sum of the gradients."""
        a, b = self.inputs, self.gradients
        return JacobianFactors(a.sum(1, keepdim=True) / max(1, a.shape[1]), b.sum(2, keepdim=True))

    def jacobians(self) -> Tensor:
        """Σ_t b_t a_tᵀ, (M, K, O, E)."""
        _, k, _, o = self.gradients.shape
        left = self.gradients.transpose(2, 3).flatten(1, 2)  # (M, K·O, T): one product per row
        jacobians: Tensor = (left @ self.inputs).unflatten(1, (k, o))
        return jacobians


@dataclass(frozen=True)
class LayerwiseRows:
    """Jacobian rows at M rows of x, for K cotangents each.

    Attributes:
        factors: of each linear map, by the name of its weight.
        other_rows: plain rows over all other parameters, (M, K, P_other).
    """

    factors: dict[str, JacobianFactors]
    other_rows: Tensor

    def pooled(self) -> LayerwiseRows:
        """The rows with the inputs and gradients of each map at one position, as `JacobianFactors.pooled`."""
        return LayerwiseRows({name: factors.pooled() for name, factors in self.factors.items()}, self.other_rows)


def rows_differ(received: str) -> UnsupportedError:
    """The error for rows that use the layers in different ways."""
    return UnsupportedError(
        "a network that uses its linear layers in the same way at every row",
        received=received,
        remedy='hessian_structure="full" with inverse="cholesky" or "cg", or RegVar.',
    )
