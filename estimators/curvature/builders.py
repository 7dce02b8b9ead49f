"""How each form of the data's curvature is made from an objective."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

from estimators.curvature.dense.ggn import dense_ggn, dense_hessian, ggn_rows
from estimators.curvature.forms import (
    DataCurvature,
    DenseCurvature,
    FactoredCurvature,
    JacobianCurvature,
    MatrixFreeCurvature,
    ProductCurvature,
    centre_of,
    restored,
)
from estimators.curvature.krylov.low_rank import low_rank_rows
from estimators.curvature.layerwise.blocks import collect
from estimators.curvature.layerwise.factored_dual import factored_rows, in_factors
from estimators.curvature.layerwise.ggn import layered_ggn, worthwhile
from estimators.curvature.layerwise.matrix_free_dual import inner_matrix, marks_of
from estimators.curvature.layerwise.whitened_rows import layers_of
from estimators.curvature.sizes import dual_bytes, n_ggn_rows, refuse_dense, streamed_bytes, whole_rows_bytes
from estimators.errors import UnsupportedError
from estimators.models.derivative_routes import FAILURES, is_ours, short
from estimators.models.jacobians import JacobianRows
from estimators.objective.float64 import to_float64
from estimators.objective.objective import LabelLoss, Objective
from estimators.runtime.memory import check_fits_memory

LOW_RANK = 100

__all__ = [
    "BUILDERS",
    "LOW_RANK",
    "Built",
    "DataCurvature",
    "DenseCurvature",
    "FactoredCurvature",
    "JacobianCurvature",
    "MatrixFreeCurvature",
    "ProductCurvature",
    "build_low_rank",
    "centre_of",
    "restored",
]


def build_matrix_ggn(objective: Objective) -> Built:
    refuse_dense(objective)
    layers = layers_of(objective)
    if worthwhile(layers):
        with suppress(UnsupportedError):  # rows that use other layers, or several times
            return DenseCurvature(layered_ggn(objective, layers), exact_hessian=False), "layers"
    jacobian = JacobianRows(objective.network)
    return DenseCurvature(dense_ggn(objective, jacobian), exact_hessian=False), jacobian.backend


def build_matrix_hessian(objective: Objective) -> Built:
    refuse_dense(objective)
    return DenseCurvature(dense_hessian(to_float64(objective)), exact_hessian=True), "products"


def build_rows(objective: Objective) -> Built:
    layers = layers_of(objective)
    _refuse_dual(objective, dual_bytes(objective, layers))
    if in_factors(layers):
        with suppress(UnsupportedError):
            return FactoredCurvature(factored_rows(objective, layers)), "layers"
        _refuse_dual(objective, whole_rows_bytes(objective, layers))
    jacobian = JacobianRows(objective.network)
    return JacobianCurvature(torch.cat(list(ggn_rows(objective, jacobian)))), jacobian.backend


def _refuse_dual(objective: Objective, needed: int) -> None:
    check_fits_memory("the dual form", needed, device=objective.theta.device, remedy='inverse="cg", or RegVar.')


def build_streamed(objective: Objective) -> Built:
    check_fits_memory(
        f"a matrix of the {n_ggn_rows(objective)} outputs of all rows",
        streamed_bytes(objective),
        device=objective.theta.device,
        remedy='inverse="cg", or RegVar.',
    )
    objective = to_float64(objective)
    try:
        marks = marks_of(objective)
        return MatrixFreeCurvature(objective, inner_matrix(objective, marks), marks), "products"
    except FAILURES as error:
        if is_ours(error):
            raise
        raise UnsupportedError(
            'a network that can be computed in float64 for inverse="streamed"',
            received=f"one for which torch says: {short(error)}",
            remedy='model.double(), or inverse="cg".',
        ) from error


def build_products(objective: Objective) -> Built:
    return ProductCurvature(objective, exact_hessian=isinstance(objective.data_term, LabelLoss)), "products"


def build_blocks(structure: str) -> Builder:
    return lambda objective: (collect(objective, structure), "layers")


def build_low_rank(rank: int) -> Builder:
    """The leading directions of the GGN."""
    return lambda objective: (JacobianCurvature(low_rank_rows(objective, rank)), "products")


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
