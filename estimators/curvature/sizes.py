"""What each form of an exact precision needs, and which to take."""

from __future__ import annotations

from estimators.curvature.dense import cholesky as dense
from estimators.curvature.dense import dual
from estimators.curvature.layerwise import factored_dual
from estimators.curvature.layerwise import matrix_free_dual as streamed_dual
from estimators.curvature.layerwise.factored_dual import in_factors
from estimators.curvature.layerwise.whitened_rows import layers_of
from estimators.models.layer_jacobians import LayerwiseJacobian
from estimators.numerics.dtype import algebra_dtype
from estimators.objective.objective import Objective
from estimators.runtime.memory import check_fits_memory

__all__ = ["choose_inverse", "dual_bytes", "n_ggn_rows", "refuse_dense", "streamed_bytes", "whole_rows_bytes"]

_STREAMED_ROWS = 4096  # N·C, beyond which its matrix takes longer than products would


def choose_inverse(objective: Objective, *, curvature: str, available: int) -> str:
    """The cheapest of "dual", "cholesky", "streamed" and "cg" that fits into half of the memory there is."""
    layers = layers_of(objective)
    n_rows, n_parameters = objective.batches.n_data * layers.n_outputs, objective.network.n_parameters
    positive = bool((objective.prior.precision > 0).all())
    if curvature == "ggn" and positive and n_rows < n_parameters and 2 * dual_bytes(objective, layers) < available:
        return "dual"
    if 2 * dense_bytes(objective) < available:
        return "cholesky"
    few = curvature == "ggn" and positive and n_rows <= _STREAMED_ROWS
    return "streamed" if few and 2 * streamed_bytes(objective) < available else "cg"


def n_ggn_rows(objective: Objective) -> int:
    """N·C."""
    first = next(iter(objective.batches))
    return objective.batches.n_data * objective.network.outputs(first.x).shape[-1]


def dense_bytes(objective: Objective) -> int:
    """Memory of the dense form: the data's matrix is kept beside the factor."""
    theta = objective.theta
    return dense.bytes_needed(theta.numel(), algebra_dtype(theta.device).itemsize)


def dual_bytes(objective: Objective, layers: LayerwiseJacobian) -> int:
    """Memory of the dual form, with its rows in factors where they can be."""
    if not in_factors(layers):
        return whole_rows_bytes(objective, layers)
    theta, maps = objective.theta, [linear.shape for linear in layers.maps.values()]
    itemsize = algebra_dtype(theta.device).itemsize
    return factored_dual.bytes_needed(objective.batches.n_data, layers.n_outputs, theta.numel(), maps, itemsize)


def whole_rows_bytes(objective: Objective, layers: LayerwiseJacobian) -> int:
    """Memory of the dual form with whole rows."""
    theta, n_rows = objective.theta, objective.batches.n_data * layers.n_outputs
    return dual.bytes_needed(n_rows, theta.numel(), algebra_dtype(theta.device).itemsize)


def streamed_bytes(objective: Objective) -> int:
    """Memory of the dual form without its rows."""
    return streamed_dual.bytes_needed(n_ggn_rows(objective), algebra_dtype(objective.theta.device).itemsize)


def refuse_dense(objective: Objective) -> None:
    """TooLargeError where the dense form would not fit."""
    check_fits_memory(
        f"a dense precision of {objective.network.n_parameters} parameters",
        dense_bytes(objective),
        device=objective.theta.device,
        remedy='inverse="dual" where N·C is small, inverse="cg", hessian_structure="ekfac", or RegVar.',
    )
