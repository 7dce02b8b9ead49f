"""The interface of a solver: from a centred objective and a perturbation to displacements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from estimators.curvature.dense.cholesky import DensePrecision
from estimators.curvature.krylov.krylov_space import KrylovSpace
from estimators.errors import EstimatorError, ModelError
from estimators.models.failures import FAILURES
from estimators.objective.objective import Objective
from estimators.option_checks import checked_number
from estimators.persistence.checkpoint import Checkpoint
from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.regvar.measured_bounds import MeasuredAccuracy
from estimators.regvar.perturbation import Perturbation
from estimators.runtime.pass_counter import SELF_CHECK

__all__ = ["Solution", "Solver", "SolverReport", "checked_lam"]


@dataclass(frozen=True)
class SolverReport:
    """Result and cost of one solve.

    Args:
        solver: `repr` of the solver.
        n_perturbations: K, the number of functions r_k that were solved for together.
        passes: cost per function r_k, in epoch equivalents (forward and backward passes over the training rows), with
            all searches, targets, perturbed copies and final checks, but without the self-check. A product with A
            costs one pass per vector (`estimators.runtime.pass_counter`).
        lam: λ of a refit, or None.
        lr: the final learning rate of a refit by SGD, or None.
        iterations: block iterations, Newton steps, or conjugate-gradient steps, or None.
        residual: the largest final ‖gradient‖ / ‖∇r‖ over the functions, if measured.
        nonlinearity: ‖Δf − J Δθ‖ / ‖J Δθ‖ at the end of a refit by FineTune, on one batch.
    """

    solver: str
    n_perturbations: int
    passes: float = 0.0
    lam: float | None = None
    lr: float | None = None
    iterations: int | None = None
    residual: float | None = None
    nonlinearity: float | None = None


@dataclass(frozen=True)
class Solution:
    """The solution of a solve.

    Args:
        displacement: u ≈ A⁻¹∇r, (K, P).
        report: result and cost.
        a_norm_errors: A-norm errors of posterior draws, if the solver knows them.
        space: the Krylov space of the solve, if the solver has one.
        accuracy: the measured accuracy of the bounds from this space, if the solver measures it.
        precision: A with its Cholesky factor, if the solver has one.
        round_off: relative error that round-off may cause in a variance by this factor.
    """

    displacement: Tensor
    report: SolverReport
    a_norm_errors: SampleANormErrors | None = None
    space: KrylovSpace | None = None
    accuracy: MeasuredAccuracy | None = None
    precision: DensePrecision | None = None
    round_off: float = 0.0


class Solver(ABC):
    """Base class of solvers, which compute u ≈ A⁻¹∇r for a perturbation; queries and likelihood are unknown to them."""

    refits: ClassVar[bool]
    """Whether the solver minimises L − λr, so that it also works for an objective that is not centred."""

    def solve(
        self,
        objective: Objective,
        perturbation: Perturbation,
        *,
        progress_bar: bool = False,
        checkpoint: Checkpoint | None = None,
    ) -> Solution:
        """Return displacements u ≈ A⁻¹∇r, (K, P), with a report.

        Args:
            objective: the objective, usually centred at θ̂.
            perturbation: K functions r_k.
            progress_bar: whether to show progress.
            checkpoint: where to save and resume an unfinished solve, or None.

        Returns:
            The solution.

        Raises:
            ModelError: if torch.func cannot transform the network.
            ConvergenceError, LambdaTooLargeError, IndefiniteHessianError: as the solver documents.
        """
        kept = (checkpoint or Checkpoint()).for_problem(perturbation.gradient.norm(dim=1))
        pass_counter = objective.network.pass_counter
        before = pass_counter.cost_except(SELF_CHECK)
        if self.refits:
            try:
                objective.check_displaced(refits=True)
            except (EstimatorError, torch.OutOfMemoryError):
                raise
            except FAILURES as error:
                raise _not_transformable(self, error) from error
        with pass_counter.phase("solve"):
            try:
                solution = self._solve(objective, perturbation, progress_bar=progress_bar, checkpoint=kept)
            except (EstimatorError, torch.OutOfMemoryError):
                raise
            except RuntimeError as error:
                raise _not_transformable(self, error) from error
        spent = pass_counter.cost_except(SELF_CHECK) - before
        passes = spent / objective.batches.n_data / len(perturbation.gradient)
        return replace(solution, report=replace(solution.report, passes=passes))

    @abstractmethod
    def _solve(
        self, objective: Objective, perturbation: Perturbation, *, progress_bar: bool, checkpoint: Checkpoint
    ) -> Solution:
        """Compute the solution; `solve` adds the checks of the network and the cost."""


def _not_transformable(solver: Solver, error: Exception) -> ModelError:
    """Return the error for a network that torch.func cannot transform."""
    return ModelError(
        f"a network whose displaced weights can be differentiated by torch.func, for {type(solver).__name__}",
        received=f"one for which torch reports: {str(error).strip().splitlines()[0][:200] if str(error) else error!r}",
        remedy="solver=LinearResponse(), which needs derivatives at the trained weights only.",
    )


def checked_lam(lam: float | str, *, auto: bool) -> float | str:
    """Return λ > 0, or "auto" if the solver can select λ; raise OptionError for other values."""
    remedy = "1e-4 in float64, or FineTune's auto."
    return checked_number("lam", lam, above=0, words=("auto",) if auto else (), remedy=remedy)
