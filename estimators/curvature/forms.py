"""The data's part of A in several forms: A for any prior follows from it without a pass over the data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from estimators.curvature.base import Precision
from estimators.curvature.dense.cholesky import DensePrecision
from estimators.curvature.dense.dual import DualPrecision
from estimators.curvature.krylov.block_lanczos import Product
from estimators.curvature.krylov.cg_precision import CGPrecision, default_tolerance
from estimators.curvature.krylov.extreme_eigenvalues import with_definite_products
from estimators.curvature.layerwise.blocks import Blocks
from estimators.curvature.layerwise.factored_dual import FactoredDual
from estimators.curvature.layerwise.factored_rows import FactoredRows
from estimators.curvature.layerwise.matrix_free_dual import MatrixFreeDual, inner_matrix
from estimators.data.training_data import AbsentTrainingData
from estimators.models.layer_layout import Layout
from estimators.numerics.dtype import algebra_dtype
from estimators.objective.float64 import to_float64
from estimators.objective.objective import Objective

__all__ = [
    "DataCurvature",
    "DenseCurvature",
    "FactoredCurvature",
    "JacobianCurvature",
    "MatrixFreeCurvature",
    "ProductCurvature",
    "centre_of",
    "restored",
]


class DataCurvature(Protocol):
    """The data's part of the posterior precision A, in one form."""

    def precision(self, prior_precision: Tensor) -> Precision:
        """A for a prior precision δ (P,)."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors from which `restored` makes it again, with the objective."""
        ...

    def description(self) -> dict[str, Any]:
        """What `restored` needs besides the tensors, in JSON types."""
        return {}

    def rescaled(self, objective: Objective, scale: float) -> DataCurvature:
        """`scale` times this one, for a new objective at the same weights and rows with another prior."""
        ...


@dataclass(frozen=True)
class DenseCurvature(DataCurvature):
    """A dense matrix (P, P); `exact_hessian` tells whether it may be singular or indefinite."""

    matrix: Tensor
    exact_hessian: bool

    def precision(self, prior_precision: Tensor) -> Precision:
        check = _may_be_indefinite(prior_precision, exact_hessian=self.exact_hessian)
        matrix = self.matrix.clone()
        matrix.diagonal().add_(prior_precision)
        smallest = 0.0 if check else float(prior_precision.min())
        return DensePrecision(matrix, check_condition=check, smallest=smallest)

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}

    def rescaled(self, objective: Objective, scale: float) -> DenseCurvature:  # noqa: ARG002
        return self if scale == 1 else replace(self, matrix=scale * self.matrix)


@dataclass(frozen=True)
class JacobianCurvature(DataCurvature):
    """GGN rows R (N·C, P)."""

    rows: Tensor

    def precision(self, prior_precision: Tensor) -> Precision:
        return DualPrecision(prior_precision, self.rows)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows}

    def rescaled(self, objective: Objective, scale: float) -> JacobianCurvature:  # noqa: ARG002
        return self if scale == 1 else JacobianCurvature(scale**0.5 * self.rows)


@dataclass(frozen=True)
class FactoredCurvature(DataCurvature):
    """GGN rows R (N·C, P) in factors, layer by layer."""

    rows: FactoredRows

    def precision(self, prior_precision: Tensor) -> Precision:
        if self.rows.suits(prior_precision):
            return FactoredDual(prior_precision, self.rows)
        return DualPrecision(prior_precision, self.rows.dense())

    def tensors(self) -> dict[str, Tensor]:
        return self.rows.tensors()

    def description(self) -> dict[str, Any]:
        return {"rows_of": self.rows.layout.description()}

    def rescaled(self, objective: Objective, scale: float) -> FactoredCurvature:  # noqa: ARG002
        return self if scale == 1 else FactoredCurvature(self.rows.scaled(scale**0.5))


@dataclass(frozen=True)
class MatrixFreeCurvature(DataCurvature):
    """R D⁻¹ Rᵀ (N·C, N·C) for the prior of an objective in float64; products with R are passes over its data.

    `checksums` are those of the batches that `inner` was computed from.
    """

    objective: Objective
    inner: Tensor
    checksums: Tensor

    def precision(self, prior_precision: Tensor) -> Precision:
        prior_precision = prior_precision.to(self.inner.dtype)
        ratio = self.objective.prior.precision / prior_precision
        if bool((ratio == ratio[0]).all()):
            return MatrixFreeDual(self.objective, prior_precision, self.inner * ratio[0], self.checksums)
        prior = replace(self.objective.prior, precision=prior_precision)
        inner = inner_matrix(replace(self.objective, prior=prior), self.checksums)
        return MatrixFreeDual(self.objective, prior_precision, inner, self.checksums)

    def tensors(self) -> dict[str, Tensor]:
        return {"inner": self.inner, "checksums": self.checksums}

    def rescaled(self, objective: Objective, scale: float) -> MatrixFreeCurvature:
        objective = to_float64(objective)
        ratio = self.objective.prior.precision / objective.prior.precision
        if bool((ratio == ratio[0]).all()):
            return MatrixFreeCurvature(objective, self.inner * (scale * ratio[0]), self.checksums)
        return MatrixFreeCurvature(objective, inner_matrix(objective, self.checksums), self.checksums)


@dataclass(frozen=True)
class ProductCurvature(DataCurvature):
    """Products with A of an objective, with another prior in place of its own."""

    objective: Objective
    exact_hessian: bool

    def precision(self, prior_precision: Tensor) -> Precision:
        if not _may_be_indefinite(prior_precision, exact_hessian=self.exact_hessian):
            return _by_products(self.objective, prior_precision, smallest=float(prior_precision.min()))
        objective = self.objective
        if not isinstance(objective.batches, AbsentTrainingData):
            objective = with_definite_products(objective, partial(_product_of, prior_precision=prior_precision))
        return _by_products(objective, prior_precision, smallest=0.0)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def rescaled(self, objective: Objective, scale: float) -> ProductCurvature:  # noqa: ARG002
        return ProductCurvature(objective, self.exact_hessian)


def centre_of(objective: Objective, curvature: str) -> Objective:
    """The objective whose A has the curvature "hessian" or "ggn"."""
    return objective if curvature == "hessian" else objective.centred(curvature="ggn")


def restored(
    objective: Objective, tensors: dict[str, Tensor], description: dict[str, Any], *, curvature: str
) -> DataCurvature:
    """The data's curvature from its tensors and description; without tensors, products that need the data."""
    if "rows_of" in description:
        layout = Layout.from_description(objective.network.subset, description["rows_of"])
        return FactoredCurvature(FactoredRows.restored(layout, tensors))
    if description:
        return Blocks.restored(objective.network, tensors, description)
    exact_hessian = curvature == "hessian"
    if "inner" in tensors:
        return MatrixFreeCurvature(to_float64(centre_of(objective, curvature)), tensors["inner"], tensors["checksums"])
    if "matrix" in tensors:
        return DenseCurvature(tensors["matrix"], exact_hessian)
    if "rows" in tensors:
        return JacobianCurvature(tensors["rows"])
    return ProductCurvature(centre_of(objective, curvature), exact_hessian)


def _product_of(objective: Objective, prior_precision: Tensor) -> Product:
    """The product with A of an objective, with another prior in place of its own."""
    return partial(_product, objective, prior_precision.to(objective.theta.dtype) - objective.prior.precision)


def _product(objective: Objective, change: Tensor, v: Tensor) -> Tensor:
    """A v, where A has the prior precision of the objective plus `change`."""
    return objective.product(v) + v * change


def _by_products(objective: Objective, prior_precision: Tensor, *, smallest: float) -> CGPrecision:
    """A by products, in the dtype of the objective, or in float64 if these are not accurate enough."""
    theta = objective.theta
    is_widest = theta.dtype == algebra_dtype(theta.device)
    return CGPrecision(
        _product_of(objective, prior_precision),
        tol=default_tolerance(theta.dtype),
        free_bytes=objective.available_bytes,
        smallest=smallest,
        in_float64=None if is_widest else partial(_in_float64, objective, prior_precision, smallest),
    )


def _in_float64(objective: Objective, prior_precision: Tensor, smallest: float) -> CGPrecision:
    """A by products in float64."""
    return _by_products(to_float64(objective), prior_precision, smallest=smallest)


def _may_be_indefinite(prior_precision: Tensor, *, exact_hessian: bool) -> bool:
    """Whether A may be indefinite: it may not if it is a GGN plus a positive prior precision."""
    return exact_hessian or not bool((prior_precision > 0).all())
