"""The memory of each form of an exact posterior precision, and the choice of a form."""

from __future__ import annotations

from estimators.curvature.dense import cholesky as dense
from estimators.curvature.dense import dual
from estimators.curvature.fisher import EXACT, Fisher
from estimators.curvature.layerwise import factored_dual, matrix_free_dual
from estimators.curvature.layerwise.factored_dual import in_factors
from estimators.curvature.layerwise.whitened_rows import layers_of
from estimators.models.layer_jacobians import LayerwiseJacobian
from estimators.numerics.dtype import algebra_dtype
from estimators.objective.objective import Objective
from estimators.runtime.memory import check_fits_memory

__all__ = ["check_dense_size", "choose_inverse", "dual_bytes", "matrix_free_bytes", "n_ggn_rows", "whole_rows_bytes"]

_MOST_MATRIX_FREE_ROWS = 4096
"""Largest N·C at which the matrix of the matrix-free dual form takes less time than products with A."""


def choose_inverse(objective: Objective, *, curvature: str, available: int, fisher: Fisher = EXACT) -> str:
    """The cheapest of "dual", "cholesky", "matrix_free_dual" and "cg" that fits into half of `available` bytes.

    Sampled and empirical Fishers have the first two only.
    """
    layers = layers_of(objective)
    n_rows = objective.batches.n_data * fisher.n_cotangents(layers.n_outputs)
    positive = bool((objective.prior.precision > 0).all())
    may_be_dual = curvature == "ggn" and positive and n_rows < objective.network.n_parameters
    if may_be_dual and 2 * dual_bytes(objective, layers, fisher) < available:
        return "dual"
    if fisher.kind != "exact" or 2 * dense_bytes(objective) < available:
        return "cholesky"
    few = curvature == "ggn" and positive and n_rows <= _MOST_MATRIX_FREE_ROWS
    return "matrix_free_dual" if few and 2 * matrix_free_bytes(objective) < available else "cg"


def n_ggn_rows(objective: Objective) -> int:
    """N·C, the number of GGN rows."""
    first = next(iter(objective.batches))
    return objective.batches.n_data * objective.network.outputs(first.x).shape[-1]


def dense_bytes(objective: Objective) -> int:
    """Memory in bytes of the dense form: the data's matrix and the factor."""
    theta = objective.theta
    return dense.bytes_needed(theta.numel(), algebra_dtype(theta.device).itemsize)


def dual_bytes(objective: Objective, layers: LayerwiseJacobian, fisher: Fisher = EXACT) -> int:
    """Memory in bytes of the dual form, with its rows in factors if the network allows."""
    if not in_factors(layers):
        return whole_rows_bytes(objective, layers, fisher)
    theta, maps = objective.theta, [linear.shape for linear in layers.maps.values()]
    itemsize = algebra_dtype(theta.device).itemsize
    n_data, n_cotangents = objective.batches.n_data, fisher.n_cotangents(layers.n_outputs)
    return factored_dual.bytes_needed(n_data, n_cotangents, theta.numel(), maps, itemsize)


def whole_rows_bytes(objective: Objective, layers: LayerwiseJacobian, fisher: Fisher = EXACT) -> int:
    """Memory in bytes of the dual form with rows of P numbers."""
    theta, n_rows = objective.theta, objective.batches.n_data * fisher.n_cotangents(layers.n_outputs)
    return dual.bytes_needed(n_rows, theta.numel(), algebra_dtype(theta.device).itemsize)


def matrix_free_bytes(objective: Objective) -> int:
    """Memory in bytes of the dual form without stored rows."""
    return matrix_free_dual.bytes_needed(n_ggn_rows(objective), algebra_dtype(objective.theta.device).itemsize)


def check_dense_size(objective: Objective) -> None:
    """Check that the dense form fits into memory.

    Raises:
        TooLargeError: it does not.
    """
    check_fits_memory(
        f"a dense precision of {objective.network.n_parameters} parameters",
        dense_bytes(objective),
        device=objective.theta.device,
        remedy='inverse="dual" if N·C is small, inverse="cg", hessian_structure="ekfac", or RegVar.',
    )
