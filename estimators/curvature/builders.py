"""Functions that make each form of the data's curvature from an objective."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from estimators.curvature.dense.ggn import dense_ggn, dense_hessian, ggn_rows
from estimators.curvature.fisher import EXACT, Fisher
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
from estimators.models.failures import FAILURES, is_final_error, short
from estimators.models.network import VJP_BY_ROW
from estimators.objective.float64 import to_float64
from estimators.objective.objective import LabelLoss, Objective
from estimators.runtime.memory import check_fits_memory

LOW_RANK = 100
"""Default rank of `hessian_structure="lowrank"`."""


__all__ = ["BUILDERS", "LOW_RANK", "Built", "GGNOptions"]


@dataclass(frozen=True)
class GGNOptions:
    """How the GGN is estimated; a builder uses what its form has, and the estimator checks the combination.

    Attributes:
        fisher: the exact GGN, or which Fisher stands for it.
        kfac_approx: "expand" or "reduce", for weights that are used at several positions of a row.
        rank: the number of leading directions of "lowrank".
    """

    fisher: Fisher = EXACT
    kfac_approx: str = "expand"
    rank: int = LOW_RANK


def build_matrix_ggn(objective: Objective, options: GGNOptions) -> Built:
    """The dense GGN, layer by layer if that is cheaper."""
    check_dense_size(objective)
    layers, fisher = layers_of(objective), options.fisher
    if worthwhile(layers, fisher):
        with suppress(UnsupportedError):  # rows use other layers, or a layer several times
            return DenseCurvature(layered_ggn(objective, layers, fisher), exact_hessian=False), "layers"
    matrix = dense_ggn(objective, fisher)
    return DenseCurvature(matrix, exact_hessian=False), _backend(objective, fisher)


def _backend(objective: Objective, fisher: Fisher) -> str:
    """The route of whole rows in use, "torch.func" or "autograd"."""
    if fisher.kind == "exact":
        return objective.network.jacobian_backend
    return "autograd" if objective.network.routes.first.get(VJP_BY_ROW, 0) else "torch.func"


def build_matrix_hessian(objective: Objective, options: GGNOptions) -> Built:  # noqa: ARG001
    """The dense Hessian."""
    check_dense_size(objective)
    return DenseCurvature(dense_hessian(to_float64(objective)), exact_hessian=True), "products"


def build_rows(objective: Objective, options: GGNOptions) -> Built:
    """GGN rows, in factors if the network allows."""
    layers, fisher = layers_of(objective), options.fisher
    _check_dual_size(objective, dual_bytes(objective, layers, fisher))
    if in_factors(layers):
        with suppress(UnsupportedError):
            return FactoredCurvature(factored_rows(objective, layers, fisher)), "layers"
        _check_dual_size(objective, whole_rows_bytes(objective, layers, fisher))
    rows = torch.cat(list(ggn_rows(objective, fisher)))
    return JacobianCurvature(rows), _backend(objective, fisher)


def _check_dual_size(objective: Objective, needed: int) -> None:
    """Raise TooLargeError if the dual form needs more memory than there is."""
    check_fits_memory("the dual form", needed, device=objective.theta.device, remedy='inverse="cg", or RegVar.')


def build_matrix_free(objective: Objective, options: GGNOptions) -> Built:  # noqa: ARG001
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


def build_products(objective: Objective, options: GGNOptions) -> Built:  # noqa: ARG001
    """Products with A, each a pass over the data."""
    return ProductCurvature(objective, exact_hessian=isinstance(objective.data_term, LabelLoss)), "products"


def build_blocks(structure: str) -> Builder:
    """A function that makes the GGN layer by layer, for "kron", "ekfac" or "diag"."""

    def build(objective: Objective, options: GGNOptions) -> Built:
        return collect(objective, structure, fisher=options.fisher, kfac_approx=options.kfac_approx), "layers"

    return build


def build_low_rank(objective: Objective, options: GGNOptions) -> Built:
    """GGN rows of the `rank` leading directions."""
    return JacobianCurvature(low_rank_rows(objective, options.rank)), "products"


Built = tuple[DataCurvature, str]
"""The data's curvature, and the route to the Jacobian rows."""
Builder = Callable[[Objective, GGNOptions], Built]
BUILDERS: dict[tuple[str, str, str], Builder] = {
    ("ggn", "full", "cholesky"): build_matrix_ggn,
    ("ggn", "full", "dual"): build_rows,
    ("ggn", "full", "matrix_free_dual"): build_matrix_free,
    ("ggn", "full", "cg"): build_products,
    ("ggn", "lowrank", "dual"): build_low_rank,
    ("ggn", "kron", "eigen"): build_blocks("kron"),
    ("ggn", "ekfac", "eigen"): build_blocks("ekfac"),
    ("ggn", "diag", "eigen"): build_blocks("diag"),
    ("hessian", "full", "cholesky"): build_matrix_hessian,
    ("hessian", "full", "cg"): build_products,
}
