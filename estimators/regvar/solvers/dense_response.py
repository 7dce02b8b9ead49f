"""Linear response by a Cholesky factor of A, where that takes less time than a Krylov space."""

from __future__ import annotations

from estimators.curvature.builders import GGNOptions, build_matrix_ggn
from estimators.curvature.dense.cholesky import DensePrecision
from estimators.curvature.sizes import dense_bytes, n_ggn_rows
from estimators.objective.objective import Objective
from estimators.persistence.checkpoint import Checkpoint
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.solvers.base import Solution, Solver, SolverReport
from estimators.regvar.solvers.to_tolerance import LinearResponseToTolerance

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
    vectors, and is too large to span θ.
    """

    refits = False

    def __repr__(self) -> str:
        return "LinearResponse by a Cholesky factor of A"

    @staticmethod
    def suits(objective: Objective) -> bool:
        """Return whether the factor fits into memory and takes less time than a Krylov space of unknown size.

        Args:
            objective: the objective, centred with the GGN, with a prior on every parameter.
        """
        n = objective.theta.numel()
        n_rows = n_ggn_rows(objective)
        n_outputs = n_rows // objective.batches.n_data
        too_small = n <= LinearResponseToTolerance.max_rank(objective) or n_rows <= n  # a space spans it exactly
        too_large = n > _MAX_PARAMETERS or n_outputs * n > _MAX_ROW_NUMBERS
        return not (too_small or too_large) and 2 * dense_bytes(objective) <= objective.available_bytes()

    def _solve(
        self,
        objective: Objective,
        perturbation: Perturbation,
        *,
        progress_bar: bool,  # noqa: ARG002
        checkpoint: Checkpoint,  # noqa: ARG002
    ) -> Solution:
        data_curvature, _ = build_matrix_ggn(objective, GGNOptions())
        precision = data_curvature.precision(objective.prior.precision)
        assert isinstance(precision, DensePrecision)
        report = SolverReport(repr(self), n_perturbations=len(perturbation.gradient))
        return Solution(precision.solve(perturbation.gradient), report, precision=precision)
