"""Linear response: the limit λ → 0, by block conjugate gradients."""

from __future__ import annotations

from estimators.objective import Objective
from estimators.precision.block_cg import block_cg
from estimators.precision.cg import default_tolerance
from estimators.regvar.penalty import Penalty
from estimators.regvar.solvers.base import Solution, Solver, SolverReport

__all__ = ["LinearResponse"]


class LinearResponse(Solver):
    """A u = ∇r for all replicas in one Krylov space, started at the penalty's first guess. No λ: it is the limit.

    Args:
        tol: relative residual ‖A u − ∇r‖ / ‖∇r‖ to reach; None takes 1e-10 in float64, 1e-5 in float32.
        max_iter: block iterations, each one product with A a replica.

    Errors: ConvergenceError beyond max_iter, IndefiniteHessianError where A is met with a negative curvature.
    """

    refits = False

    def __init__(self, tol: float | None = None, max_iter: int = 1000) -> None:
        self.tol, self.max_iter = tol, max_iter

    def __repr__(self) -> str:
        return f"LinearResponse(tol={self.tol}, max_iter={self.max_iter})"

    def solve(self, objective: Objective, penalty: Penalty, *, progress_bar: bool = False) -> Solution:  # noqa: ARG002
        tol = default_tolerance(objective.theta.dtype) if self.tol is None else self.tol
        solved = block_cg(objective.product, penalty.direction, start=penalty.start, tol=tol, max_iter=self.max_iter)
        replicas = len(penalty.direction)
        report = SolverReport(
            repr(self),
            replicas=replicas,
            passes=solved.products / replicas,
            iterations=solved.iterations,
            residual=float(solved.residuals.max()),
        )
        return Solution(solved.solution, report)
