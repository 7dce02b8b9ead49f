"""From the data's curvature to a precision for any prior: a new δ costs no new pass over the data where it is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from estimators.batches import AbsentBatches
from estimators.curvature import dense_ggn, dense_hessian, ggn_rows
from estimators.jacobians import JacobianRows
from estimators.layer_rows import Layers
from estimators.memory import refuse_if_too_large
from estimators.objective import Labels, Objective
from estimators.precision.base import Precision
from estimators.precision.cg import CGPrecision, default_tolerance
from estimators.precision.definiteness import refuse_indefinite_product
from estimators.precision.dense import DensePrecision
from estimators.precision.dtype import algebra_dtype
from estimators.precision.dual import DualPrecision
from estimators.precision.layered_ggn import layered_ggn, worthwhile
from estimators.precision.low_rank import low_rank_rows
from estimators.precision.sizes import dual_bytes, n_ggn_rows, refuse_dense, streamed_bytes
from estimators.precision.streamed_dual import StreamedDual, inner_matrix, marks_of
from estimators.precision.structured import Blocks, collect
from estimators.widened import widened

LOW_RANK = 100

__all__ = [
    "BUILDERS",
    "LOW_RANK",
    "DataCurvature",
    "Products",
    "Rows",
    "StreamedRows",
    "build_low_rank",
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


@dataclass(frozen=True)
class Matrix:
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


@dataclass(frozen=True)
class Rows:
    """GGN rows R (N·C, P)."""

    rows: Tensor

    def precision(self, prior_precision: Tensor) -> Precision:
        return DualPrecision(prior_precision, self.rows)

    def tensors(self) -> dict[str, Tensor]:
        return {"rows": self.rows}

    def description(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class StreamedRows:
    """R D⁻¹ Rᵀ (N·C, N·C) for the prior of an objective in float64, whose data give products with R."""

    objective: Objective
    inner: Tensor
    marks: Tensor

    def precision(self, prior_precision: Tensor) -> Precision:
        prior_precision = prior_precision.to(self.inner.dtype)
        ratio = self.objective.prior.precision / prior_precision
        if bool((ratio == ratio[0]).all()):
            return StreamedDual(self.objective, prior_precision, self.inner * ratio[0], self.marks)
        prior = replace(self.objective.prior, precision=prior_precision)
        inner = inner_matrix(replace(self.objective, prior=prior), self.marks)
        return StreamedDual(self.objective, prior_precision, inner, self.marks)

    def tensors(self) -> dict[str, Tensor]:
        return {"inner": self.inner, "marks": self.marks}

    def description(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Products:
    """Products with A of an objective, whose own prior is exchanged for the one asked for."""

    objective: Objective
    exact_hessian: bool

    def precision(self, prior_precision: Tensor) -> Precision:
        change, theta = prior_precision - self.objective.prior.precision, self.objective.theta

        def product(v: Tensor) -> Tensor:
            return self.objective.product(v) + v * change

        absent = isinstance(self.objective.batches, AbsentBatches)
        if not absent and _is_doubtful(prior_precision, exact_hessian=self.exact_hessian):
            refuse_indefinite_product(product, theta)
        return CGPrecision(product, tol=default_tolerance(theta.dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def description(self) -> dict[str, Any]:
        return {}


def centre_of(objective: Objective, curvature: str) -> Objective:
    """The objective whose products are those of the curvature asked for."""
    return objective if curvature == "hessian" else objective.centred(curvature="ggn")


def restored(
    objective: Objective, tensors: dict[str, Tensor], description: dict[str, Any], *, curvature: str
) -> DataCurvature:
    """The data's curvature from its tensors; without any it is products, which need the data."""
    if description:
        return Blocks.restored(objective.network, tensors, description)
    exact_hessian = curvature == "hessian"
    if "inner" in tensors:
        return StreamedRows(widened(centre_of(objective, curvature)), tensors["inner"], tensors["marks"])
    if "matrix" in tensors:
        return Matrix(tensors["matrix"], exact_hessian)
    return Rows(tensors["rows"]) if "rows" in tensors else Products(centre_of(objective, curvature), exact_hessian)


def _is_doubtful(prior_precision: Tensor, *, exact_hessian: bool) -> bool:
    """A GGN is positive definite wherever the prior is; nothing else can be taken for granted."""
    return exact_hessian or not bool((prior_precision > 0).all())


def build_matrix_ggn(objective: Objective) -> Built:
    refuse_dense(objective)
    layers = Layers(objective.network, next(iter(objective.batches)).x)
    if worthwhile(objective, layers):
        return Matrix(layered_ggn(objective, layers), exact_hessian=False), "layers"
    jacobian = JacobianRows(objective.network)
    return Matrix(dense_ggn(objective, jacobian), exact_hessian=False), jacobian.backend


def build_matrix_hessian(objective: Objective) -> Built:
    refuse_dense(objective)
    return Matrix(dense_hessian(objective), exact_hessian=True), "products"


def build_rows(objective: Objective) -> Built:
    refuse_if_too_large(
        "the dual form", dual_bytes(objective), device=objective.theta.device, remedy='inverse="cg", or RegVar.'
    )
    dtype, jacobian = algebra_dtype(objective.theta.device), JacobianRows(objective.network)
    return Rows(torch.cat([rows.to(dtype) for rows in ggn_rows(objective, jacobian)])), jacobian.backend


def build_streamed(objective: Objective) -> Built:
    refuse_if_too_large(
        f"a matrix of the {n_ggn_rows(objective)} outputs of all rows",
        streamed_bytes(objective),
        device=objective.theta.device,
        remedy='inverse="cg", or RegVar.',
    )
    objective = widened(objective)
    marks = marks_of(objective)
    return StreamedRows(objective, inner_matrix(objective, marks), marks), "products"


def build_products(objective: Objective) -> Built:
    return Products(objective, exact_hessian=isinstance(objective.data_term, Labels)), "products"


def build_blocks(structure: str) -> Builder:
    return lambda objective: (collect(objective, structure), "layers")


def build_low_rank(rank: int) -> Builder:
    """The leading directions of the GGN."""
    return lambda objective: (Rows(low_rank_rows(objective, rank)), "products")


Built = tuple[DataCurvature, str]
"""The data's curvature, and where Jacobian rows came from."""
Builder = Callable[[Objective], Built]
BUILDERS: dict[tuple[str, str, str], Builder] = {
    ("ggn", "full", "cholesky"): build_matrix_ggn,
    ("ggn", "full", "dual"): build_rows,
    ("ggn", "full", "streamed"): build_streamed,
    ("ggn", "full", "cg"): build_products,
    ("ggn", "lowrank", "dual"): build_low_rank(LOW_RANK),
    ("ggn", "kron", "eigen"): build_blocks("kron"),
    ("ggn", "ekfac", "eigen"): build_blocks("ekfac"),
    ("ggn", "diag", "eigen"): build_blocks("diag"),
    ("hessian", "full", "cholesky"): build_matrix_hessian,
    ("hessian", "full", "cg"): build_products,
}
