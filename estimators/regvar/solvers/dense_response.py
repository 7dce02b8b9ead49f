"""Linear response by a Cholesky factor of A, where that takes less time than a Krylov space."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from estimators.curvature.builders import GGNOptions, build_matrix_ggn
from estimators.curvature.dense.cholesky import DensePrecision
from estimators.curvature.forms import DenseCurvature
from estimators.curvature.krylov.block_cg import products_are_accurate
from estimators.curvature.sizes import dense_bytes, n_ggn_rows
from estimators.errors import IllConditionedError, IndefiniteHessianError
from estimators.numerics.reductions import norms
from estimators.objective.objective import Objective
from estimators.persistence.checkpoint import Checkpoint
from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.solvers.base import Solution, Solver, SolverReport
from estimators.regvar.solvers.to_tolerance import LinearResponseToTolerance, round_off

__all__ = ["DenseResponse"]

_MAX_PARAMETERS = 6144
"""Largest number of parameters: the factor is part of the fit, and has 300 MB then."""
_MAX_ROW_NUMBERS = 12_000
"""Largest number of entries of the Jacobian of a row, C·P.

The dense GGN adds N·C·P² products of two numbers, at 0.03 ns each; a product with A takes 1.4 ns for each of N·P
(measured on bike sharing, 13,900 rows and 3,251 parameters, on one core). At C·P = 12,000 the matrix takes as long as
260 products, and the smallest space that is measured needs 290.
"""


class DenseResponse(Solver):
    """Solves A u = ∇r for all functions r_k by a Cholesky factor of the GGN, which gives the exact variance, too.

    solver="auto" selects it for networks of a few thousand parameters: their Krylov space may need a good part of all
    vectors, and is too large to span θ. If round-off in float64 leaves A without a factor, a Krylov space is grown.

    Args:
        rtol: relative error to reach, of such a space.
        seed: seed of the rows at which it is measured.
    """

    refits = False

    def __init__(self, rtol: float, seed: int = 0) -> None:
        self.rtol, self.seed = rtol, seed

    def __repr__(self) -> str:
        return "LinearResponse by a Cholesky factor of A"

    @staticmethod
    def suits(objective: Objective) -> bool:
        """Return whether the factor fits into memory and takes less time than a Krylov space of unknown size.

        Args:
            objective: the objective, centred with the GGN, with a prior on every parameter.
        """
        n = objective.theta.numel()
        if not LinearResponseToTolerance.max_rank(objective) < n <= _MAX_PARAMETERS:  # before any forward pass
            return False
        n_rows = n_ggn_rows(objective)
        n_outputs = n_rows // objective.batches.n_data
        cheap = n < n_rows and n_outputs * n <= _MAX_ROW_NUMBERS  # with fewer rows a space spans all of them
        return cheap and 2 * dense_bytes(objective) <= objective.available_bytes()

    def _solve(
        self, objective: Objective, perturbation: Perturbation, *, progress_bar: bool, checkpoint: Checkpoint
    ) -> Solution:
        delta, dtype = objective.prior.precision, objective.theta.dtype
        data_curvature, _ = build_matrix_ggn(objective, GGNOptions())
        assert isinstance(data_curvature, DenseCurvature)
        condition = 1 + _whitened_norm(data_curvature.matrix, delta)
        if not products_are_accurate(dtype, largest=condition, smallest=1.0):  # the Jacobian has too few digits
            raise IllConditionedError(condition=condition, dtype=dtype)
        try:
            precision = data_curvature.precision(delta)
        except IndefiniteHessianError:
            krylov = LinearResponseToTolerance(self.rtol, self.seed)
            found = krylov._solve(objective, perturbation, progress_bar=progress_bar, checkpoint=checkpoint)
            name = f"{krylov!r}, since round-off leaves A without a Cholesky factor"
            return replace(found, report=replace(found.report, solver=name))
        assert isinstance(precision, DensePrecision)
        u, xi = precision.solve(perturbation.gradient), perturbation.gradient
        slope = (u.to(data_curvature.matrix) @ data_curvature.matrix + delta * u - xi).to(u)  # A u − ξ
        report = SolverReport(repr(self), n_perturbations=len(xi), residual=float((norms(slope) / norms(xi)).max()))
        a_norm_errors = SampleANormErrors.of(perturbation, delta, u, slope)
        error = round_off(condition) if dtype == torch.float64 else 0.0
        return Solution(u, report, a_norm_errors, precision=precision, round_off=error)


def _whitened_norm(matrix: Tensor, delta: Tensor) -> float:
    """The Frobenius norm of δ^(−½) G δ^(−½), at least the largest eigenvalue."""
    scale = delta.to(matrix).rsqrt()
    return float((matrix * scale * scale[:, None]).norm())
