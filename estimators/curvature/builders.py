"""Functions that make each form of the data's curvature from an objective."""

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
)
from estimators.curvature.krylov.low_rank import low_rank_rows
from estimators.curvature.layerwise.blocks import collect
from estimators.curvature.layerwise.factored_dual import factored_rows, in_factors
from estimators.curvature.layerwise.ggn import layered_ggn, worthwhile
from estimators.curvature.layerwise.matrix_free_dual import batch_checksums, inner_matrix
from estimators.curvature.layerwise.whitened_rows import layers_of
from estimators.curvature.sizes import check_dense_size, dual_bytes, matrix_free_bytes, n_ggn_rows, whole_rows_bytes
from estimators.errors import UnsupportedError
from estimators.models.derivative_routes import FAILURES, is_final_error, short
from estimators.objective.float64 import to_float64
from estimators.objective.objective import LabelLoss, Objective
from estimators.runtime.memory import check_fits_memory

LOW_RANK = 100
"""Default rank of `hessian_structure="lowrank"`."""

__all__ = ["BUILDERS", "LOW_RANK", "Built", "build_low_rank"]


def build_matrix_ggn(objective: Objective) -> Built:
    """The dense GGN, layer by layer if that is cheaper."""
    check_dense_size(objective)
    layers = layers_of(objective)
    if worthwhile(layers):
        with suppress(UnsupportedError):  # rows use other layers, or a layer several times
            return DenseCurvature(layered_ggn(objective, layers), exact_hessian=False), "layers"
    return DenseCurvature(dense_ggn(objective), exact_hessian=False), objective.network.jacobian_backend


def build_matrix_hessian(objective: Objective) -> Built:
    """The dense Hessian."""
    check_dense_size(objective)
    return DenseCurvature(dense_hessian(to_float64(objective)), exact_hessian=True), "products"


def build_rows(objective: Objective) -> Built:
    """GGN rows, in factors if the network allows."""
    layers = layers_of(objective)
    _check_dual_size(objective, dual_bytes(objective, layers))
    if in_factors(layers):
        with suppress(UnsupportedError):
            return FactoredCurvature(factored_rows(objective, layers)), "layers"
        _check_dual_size(objective, whole_rows_bytes(objective, layers))
    return JacobianCurvature(torch.cat(list(ggn_rows(objective)))), objective.network.jacobian_backend


def _check_dual_size(objective: Objective, needed: int) -> None:
    """Raise TooLargeError if the dual form needs more memory than there is."""
    check_fits_memory("the dual form", needed, device=objective.theta.device, remedy='inverse="cg", or RegVar.')


def build_matrix_free(objective: Objective) -> Built:
    """R D⁻¹ Rᵀ without stored rows R."""
    check_fits_memory(
        f"a matrix of the {n_ggn_rows(objective)} outputs of all rows",
        matrix_free_bytes(objective),
        device=objective.theta.device,
        remedy='inverse="cg", or RegVar.',
    )
    objective = to_float64(objective)
    try:
        checksums = batch_checksums(objective)
        return MatrixFreeCurvature(objective, inner_matrix(objective, checksums), checksums), "products"
    except FAILURES as error:
        if is_final_error(error):
            raise
        raise UnsupportedError(
            'a network that can be computed in float64 for inverse="matrix_free_dual"',
            received=f"one for which torch says: {short(error)}",
            remedy='model.double(), or inverse="cg".',
        ) from error


def build_products(objective: Objective) -> Built:
    """Products with A, each a pass over the data."""
    return ProductCurvature(objective, exact_hessian=isinstance(objective.data_term, LabelLoss)), "products"


def build_blocks(structure: str) -> Builder:
    """A function that makes the GGN layer by layer, for "kron", "ekfac" or "diag"."""
    return lambda objective: (collect(objective, structure), "layers")


def build_low_rank(rank: int) -> Builder:
    """A function that makes GGN rows of the `rank` leading directions."""
    return lambda objective: (JacobianCurvature(low_rank_rows(objective, rank)), "products")


Built = tuple[DataCurvature, str]
"""The data's curvature, and the route to the Jacobian rows."""
Builder = Callable[[Objective], Built]
BUILDERS: dict[tuple[str, str, str], Builder] = {
    ("ggn", "full", "cholesky"): build_matrix_ggn,
    ("ggn", "full", "dual"): build_rows,
    ("ggn", "full", "matrix_free_dual"): build_matrix_free,
    ("ggn", "full", "cg"): build_products,
    ("ggn", "lowrank", "dual"): build_low_rank(LOW_RANK),
    ("ggn", "kron", "eigen"): build_blocks("kron"),
    ("ggn", "ekfac", "eigen"): build_blocks("ekfac"),
    ("ggn", "diag", "eigen"): build_blocks("diag"),
    ("hessian", "full", "cholesky"): build_matrix_hessian,
    ("hessian", "full", "cg"): build_products,
}
