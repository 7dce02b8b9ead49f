"""The interface of a solver: from a centred objective and a penalty to displacements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from estimators.curvature.krylov.krylov_space import KrylovSpace
from estimators.errors import EstimatorError, ModelError
from estimators.models.network import FAILURES
from estimators.objective.objective import Objective
from estimators.option_checks import checked_number
from estimators.persistence.checkpoint import Checkpoint
from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.regvar.perturbation import Perturbation
from estimators.runtime.pass_counter import SELF_CHECK

__all__ = ["Solution", "Solver", "SolverReport", "checked_lam"]


@dataclass(frozen=True)
class SolverReport:
    """What a solve did.

    passes: what it spent a replica, in passes of forward and backward over the training rows: searches, targets, every
        arm, checks at the end; the self-check apart. A product with A is one a vector, and the forwards that all share
        a third each (`estimators.runtime.pass_counter`);
    residual: the worst ‖gradient‖ / ‖∇r‖ at the end, where it was measured;
    nonlinearity: ‖Δf − J Δθ‖ / ‖J Δθ‖ at the end of a minibatch refit, on one batch.
    """

    solver: str
    replicas: int
    passes: float = 0.0
    lam: float | None = None
    lr: float | None = None
    iterations: int | None = None
    residual: float | None = None
    nonlinearity: float | None = None


@dataclass(frozen=True)
class Solution:
    """Displacements (K, P) ≈ A⁻¹∇r, and the report; where the solver has them, energies and its Krylov space."""

    displacement: Tensor
    report: SolverReport
    energies: SampleANormErrors | None = None
    space: KrylovSpace | None = None


class Solver(ABC):
    """Maps (objective, penalty) to displacements; it sees neither the queries nor the likelihood."""

    refits: ClassVar[bool]
    """Whether it minimises L − λr, and so can be used on an objective that is not centred."""

    def solve(
        self,
        objective: Objective,
        perturbation: Perturbation,
        *,
        progress_bar: bool = False,
        checkpoint: Checkpoint | None = None,
    ) -> Solution:
        """Displacements (K, P)."""
        kept = (checkpoint or Checkpoint()).belonging_to(perturbation.direction.norm(dim=1))
        pass_counter = objective.network.pass_counter
        before = pass_counter.cost_without(SELF_CHECK)
        if self.refits:
            try:
                objective.check_displaced()
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
        passes = (
            (pass_counter.cost_without(SELF_CHECK) - before) / objective.batches.n_data / len(perturbation.direction)
        )
        return replace(solution, report=replace(solution.report, passes=passes))

    @abstractmethod
    def _solve(
        self, objective: Objective, perturbation: Perturbation, *, progress_bar: bool, checkpoint: Checkpoint
    ) -> Solution:
        """The solver's own part of `solve`."""


def _not_transformable(solver: Solver, error: Exception) -> ModelError:
    return ModelError(
        f"a network whose displaced weights can be differentiated by torch.func, for {type(solver).__name__}",
        received=f"one for which torch says: {str(error).strip().splitlines()[0][:200] if str(error) else error!r}",
        remedy="solver=LinearResponse(), which needs derivatives at the trained weights only.",
    )


def checked_lam(lam: float | str, *, auto: bool) -> float | str:
    """λ > 0, or "auto" where the solver can choose."""
    remedy = "1e-4 in float64, or FineTune's auto."
    return checked_number("lam", lam, above=0, words=("auto",) if auto else (), remedy=remedy)
