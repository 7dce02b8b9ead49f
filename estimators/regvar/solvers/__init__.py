"""The solvers of RegVar, one per file: two that refit at a finite λ, and the limit λ → 0."""

from estimators.regvar.solvers.base import Solution, Solver, SolverReport
from estimators.regvar.solvers.fine_tune import FineTune
from estimators.regvar.solvers.linear_response import LinearResponse
from estimators.regvar.solvers.newton_refit import NewtonRefit

__all__ = ["FineTune", "LinearResponse", "NewtonRefit", "Solution", "Solver", "SolverReport"]
