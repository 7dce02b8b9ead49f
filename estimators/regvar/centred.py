"""Which objective is refitted: centred at θ̂ with the curvature asked for, or the paper's own."""

from __future__ import annotations

from estimators.errors import OptionError, UnsupportedError
from estimators.objective import Objective
from estimators.regvar.regularizers import Regularizer
from estimators.regvar.solvers import Solver

__all__ = ["check_combination", "refit_objective"]


def refit_objective(objective: Objective, *, curvature: str, centred: bool) -> Objective:
    """The centred objective of `curvature`, or L itself: exact only where θ̂ is stationary (docs/math.md, section 3)."""
    return objective.centred(curvature=curvature) if centred else objective


def check_combination(regularizer: Regularizer, solver: Solver, *, curvature: str, centred: bool) -> None:
    """OptionError or UnsupportedError for parts that do not go together."""
    if curvature not in ("ggn", "hessian"):
        raise OptionError('curvature "ggn" or "hessian"', received=repr(curvature), remedy='use "ggn".')
    if not isinstance(regularizer, Regularizer) or not isinstance(solver, Solver):
        raise OptionError(
            "a regularizer and a solver",
            received=f"{regularizer!r} and {solver!r}",
            remedy="for instance regularizer=PosteriorDraws(), solver=LinearResponse(): objects, not classes.",
        )
    if regularizer.needs_ggn and curvature == "hessian":
        raise UnsupportedError(
            f'curvature="ggn" with {type(regularizer).__name__}, whose noise has the GGN as its covariance',
            received='"hessian", which would give the sandwich H⁻¹GH⁻¹',
            remedy="Pointwise() or ParameterProbes(), right for any positive definite curvature.",
        )
    if not centred and (curvature == "ggn" or not solver.refits):
        raise OptionError(
            'curvature="hessian" and a solver that refits with centred=False: the trained loss itself is refitted',
            received=f'curvature="{curvature}" and {type(solver).__name__}',
            remedy='curvature="hessian" with NewtonRefit or FineTune, or centred=True.',
        )
