"""The data's part of A in the form that it was made in, from which A follows for any prior without a pass over data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from estimators.curvature.base import Precision
from estimators.curvature.dense.cholesky import DensePrecision
from estimators.curvature.dense.dual import DualPrecision
from estimators.curvature.krylov.block_lanczos import Product
from estimators.curvature.krylov.cg_precision import CGPrecision, default_tolerance
from estimators.curvature.krylov.definiteness import positive_definite
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
    """The data's part of A, kept in one form."""

    def precision(self, prior_precision: Tensor) -> Precision:
        """A for a prior precision vector δ (P,)."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What `restored` needs to make it again, beside the objective."""
        ...

    def description(self) -> dict[str, Any]:
        """What it needs beside the tensors, in JSON types."""
        ...

    def moved(self, objective: Objective, scale: float) -> DataCurvature:
        """`scale` times this one, for the centre of a new fit at the same weights and rows, whose prior is another."""
        ...


@dataclass(frozen=True)
class DenseCurvature:
    """A dense (P, P) matrix; `exact_hessian` marks one that may be singular or indefinite."""

    matrix: Tensor
    exact_hessian: bool

    def precision(self, prior_precision: Tensor) -> Precision:
        doubtful = _is_doubtful(prior_precision, exact_hessian=self.exact_hessian)
        matrix = self.matrix.clone()
        matrix.diagonal().add_(prior_precision)
        return DensePrecision(
            matrix, check_condition=doubtful, smallest=0.0 if doubtful else float(prior_precision.min())
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}

    def description(self) -> dict[str, Any]:
        return {}

    def moved(self, objective: Objective, scale: float) -> DenseCurvature:  # noqa: ARG002
        return self if scale == 1 else replace(self, matrix=scale * self.matrix)


@dataclass(frozen=True)
class JacobianCurvature:
    """GGN rows R (N·C, P)."""

    rows: Tensor

    def precision(self, prior_precision: Tensor) -> Precision:
        return DualPrecision(prior_precision, self.rows)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows}

    def description(self) -> dict[str, Any]:
        return {}

    def moved(self, objective: Objective, scale: float) -> JacobianCurvature:  # noqa: ARG002
        return self if scale == 1 else JacobianCurvature(scale**0.5 * self.rows)


@dataclass(frozen=True)
class FactoredCurvature:
    """GGN rows R (N·C, P), layer by layer in factors."""

    rows: FactoredRows

    def precision(self, prior_precision: Tensor) -> Precision:
        return FactoredDual(prior_precision, self.rows)

    def tensors(self) -> dict[str, Tensor]:
        return self.rows.tensors()

    def description(self) -> dict[str, Any]:
        return {"rows_of": self.rows.layout.description()}

    def moved(self, objective: Objective, scale: float) -> FactoredCurvature:  # noqa: ARG002
        return self if scale == 1 else FactoredCurvature(self.rows.scaled(scale**0.5))


@dataclass(frozen=True)
class MatrixFreeCurvature:
    """R D⁻¹ Rᵀ (N·C, N·C) for the prior of an objective in float64, whose data give products with R."""

    objective: Objective
    inner: Tensor
    marks: Tensor

    def precision(self, prior_precision: Tensor) -> Precision:
        prior_precision = prior_precision.to(self.inner.dtype)
        ratio = self.objective.prior.precision / prior_precision
        if bool((ratio == ratio[0]).all()):
            return MatrixFreeDual(self.objective, prior_precision, self.inner * ratio[0], self.marks)
        prior = replace(self.objective.prior, precision=prior_precision)
        inner = inner_matrix(replace(self.objective, prior=prior), self.marks)
        return MatrixFreeDual(self.objective, prior_precision, inner, self.marks)

    def tensors(self) -> dict[str, Tensor]:
        return {"inner": self.inner, "marks": self.marks}

    def description(self) -> dict[str, Any]:
        return {}

    def moved(self, objective: Objective, scale: float) -> MatrixFreeCurvature:
        objective = to_float64(objective)
        ratio = self.objective.prior.precision / objective.prior.precision
        if bool((ratio == ratio[0]).all()):
            return MatrixFreeCurvature(objective, self.inner * (scale * ratio[0]), self.marks)
        return MatrixFreeCurvature(objective, inner_matrix(objective, self.marks), self.marks)


@dataclass(frozen=True)
class ProductCurvature:
    """Products with A of an objective, whose own prior is exchanged for the one asked for."""

    objective: Objective
    exact_hessian: bool

    def precision(self, prior_precision: Tensor) -> Precision:
        if not _is_doubtful(prior_precision, exact_hessian=self.exact_hessian):
            return _by_products(self.objective, prior_precision, smallest=float(prior_precision.min()))
        here = self.objective
        if not isinstance(here.batches, AbsentTrainingData):
            here = positive_definite(here, lambda objective: _product_of(objective, prior_precision))
        return _by_products(here, prior_precision, smallest=0.0)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def description(self) -> dict[str, Any]:
        return {}

    def moved(self, objective: Objective, scale: float) -> ProductCurvature:  # noqa: ARG002
        return ProductCurvature(objective, self.exact_hessian)


def centre_of(objective: Objective, curvature: str) -> Objective:
    """The objective whose products are those of the curvature asked for."""
    return objective if curvature == "hessian" else objective.centred(curvature="ggn")


def restored(
    objective: Objective, tensors: dict[str, Tensor], description: dict[str, Any], *, curvature: str
) -> DataCurvature:
    """The data's curvature from its tensors; without any it is products, which need the data."""
    if "rows_of" in description:
        layout = Layout.described(objective.network.subset, description["rows_of"])
        return FactoredCurvature(FactoredRows.restored(layout, tensors))
    if description:
        return Blocks.restored(objective.network, tensors, description)
    exact_hessian = curvature == "hessian"
    if "inner" in tensors:
        return MatrixFreeCurvature(to_float64(centre_of(objective, curvature)), tensors["inner"], tensors["marks"])
    if "matrix" in tensors:
        return DenseCurvature(tensors["matrix"], exact_hessian)
    return (
        JacobianCurvature(tensors["rows"])
        if "rows" in tensors
        else ProductCurvature(centre_of(objective, curvature), exact_hessian)
    )


def _product_of(objective: Objective, prior_precision: Tensor) -> Product:
    """Products with A of an objective, with another prior in place of its own."""
    change = prior_precision.to(objective.theta.dtype) - objective.prior.precision
    return lambda v: objective.product(v) + v * change


def _by_products(objective: Objective, prior_precision: Tensor, *, smallest: float) -> CGPrecision:
    """A by products, in the dtype of the objective; in float64 where these are not accurate enough."""
    theta = objective.theta
    widest = theta.dtype == algebra_dtype(theta.device)
    return CGPrecision(
        _product_of(objective, prior_precision),
        tol=default_tolerance(theta.dtype),
        free=objective.available_bytes,
        smallest=smallest,
        wider=None if widest else lambda: _by_products(to_float64(objective), prior_precision, smallest=smallest),
    )


def _is_doubtful(prior_precision: Tensor, *, exact_hessian: bool) -> bool:
    """A GGN is positive definite wherever the prior is; nothing else can be taken for granted."""
    return exact_hessian or not bool((prior_precision > 0).all())
