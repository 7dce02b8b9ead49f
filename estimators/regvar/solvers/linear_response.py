"""Linear response: the limit λ → 0, by block conjugate gradients."""

from __future__ import annotations

import torch

from estimators.curvature.krylov.block_cg import BlockSolution, GoOn, block_cg
from estimators.curvature.krylov.cg_precision import default_tolerance
from estimators.curvature.krylov.krylov_space import KrylovSpace
from estimators.curvature.krylov.stored_rows import HALVES
from estimators.curvature.krylov.whitening import PriorWhitening
from estimators.errors import OptionError
from estimators.objective.objective import Objective
from estimators.option_checks import checked_integer, checked_number, shown
from estimators.persistence.checkpoint import Checkpoint
from estimators.regvar.a_norm_error import FAIR, SampleANormErrors
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.solvers.base import Solution, Solver, SolverReport

__all__ = ["LinearResponse"]

_ENERGY = 1e-3
_GOOD = 0.1  # energy error per dimension to come to, for draws that are not FAIR where their budget ends
_LONGEST, _MOST_BYTES = 4, 2**31  # times the budget, and of the space, by then


class LinearResponse(Solver):
    """A u = ∇r for all replicas in one Krylov space, started at the penalty's first guess. No λ: it is the limit.

    Solved in coordinates where the prior is a multiple of the identity: those of θ for a single δ, √δ θ, a
    preconditioner, for several. The space is handed on with the solution: posterior draws read bounds from it.

    Args:
        tol: relative residual ‖A u − ∇r‖ / ‖∇r‖ to reach. None: 1e-10 in float64; in float32 1e-5, or, with the GGN,
            ‖A u − ∇r‖² ≤ 1e-3 ∇rᵀu in the coordinates of the prior, which bounds the relative error of ∇rᵀu (for
            Pointwise, the variance) by 1e-3; or the penalty's budget of products (posterior draws: noisy anyway),
            and up to four times as many, while their space takes at most 2 GiB, where the energy error is large then.
        max_iter: block iterations, each one product with A a replica.
        basis_dtype: of the space that is kept with the fit: torch.float16 or torch.bfloat16 halves its memory and the
            file; None keeps it as it was solved in. On digits the variance changes by 4e-4 and 3e-3.

    Errors: ConvergenceError beyond max_iter, IndefiniteHessianError where A is met with a negative curvature,
    IllConditionedError where products in float32 are not accurate enough (RegVar then solves in float64).
    """

    refits = False

    def __init__(
        self, tol: float | None = None, max_iter: int = 1000, *, basis_dtype: torch.dtype | None = None
    ) -> None:
        self.tol = checked_number("tol", tol, above=0, words=(None,), remedy="None, or 1e-6.")
        self.max_iter = checked_integer("max_iter", max_iter, at_least=1, remedy="1000.")
        self.basis_dtype = basis_dtype
        if not (basis_dtype is None or (isinstance(basis_dtype, torch.dtype) and basis_dtype in HALVES)):
            raise OptionError(
                f"basis_dtype None or one of {', '.join(map(str, HALVES))}",
                received=shown(basis_dtype),
                remedy="None keeps the basis in the dtype of the model.",
            )

    def __repr__(self) -> str:
        kept = "" if self.basis_dtype is None else f", basis_dtype={self.basis_dtype}"
        return f"LinearResponse(tol={self.tol}, max_iter={self.max_iter}{kept})"

    def _solve(
        self,
        objective: Objective,
        perturbation: Perturbation,
        *,
        progress_bar: bool,  # noqa: ARG002
        checkpoint: Checkpoint,
    ) -> Solution:
        delta = objective.prior.precision
        coordinates = PriorWhitening.of(delta)
        solved = self._solved(objective, perturbation, coordinates, checkpoint)
        report = SolverReport(
            repr(self),
            replicas=len(perturbation.direction),
            iterations=solved.iterations,
            residual=float(solved.residuals.max()),
        )
        energies = (
            None if perturbation.start is None else SampleANormErrors.solved(perturbation, delta, coordinates, solved)
        )
        displacement, space = coordinates.back_(solved.solution), None
        if coordinates.unit > 0 and solved.iterations:
            space = KrylovSpace.of(solved, coordinates, delta, self.basis_dtype)
        return Solution(displacement, report, energies, space)

    def _solved(
        self, objective: Objective, perturbation: Perturbation, coordinates: PriorWhitening, checkpoint: Checkpoint
    ) -> BlockSolution:
        """ũ with (s A s) ũ = s ∇r, u = s ũ."""
        budget = perturbation.budget if self.tol is None else None
        most = self.max_iter if budget is None else min(self.max_iter, max(1, budget - 1))  # one for the start
        bounded = self.tol is None and self._bounded(objective, perturbation, coordinates)
        return block_cg(
            coordinates.product(objective.product),
            coordinates.right(perturbation.direction),
            start=coordinates.into(perturbation.start),
            tol=default_tolerance(objective.theta.dtype) if self.tol is None else self.tol,
            energy_tol=_ENERGY * coordinates.unit if bounded else 0.0,
            max_iter=most,
            must_converge=budget is None,
            go_on=None if budget is None else self._until_good(objective, perturbation, coordinates, most),
            checkpoint=checkpoint,
            free=objective.available_bytes,
            smallest=coordinates.unit if objective.data_term.semidefinite else 0.0,
        )

    def _bounded(self, objective: Objective, perturbation: Perturbation, coordinates: PriorWhitening) -> bool:
        """Whether a residual bounds the error of ∇rᵀu: A ⪰ unit, ∇rᵀ(A⁻¹∇r − u) = rᵀA⁻¹r ≤ ‖r‖²/unit, u from zero."""
        curved = objective.data_term.semidefinite and coordinates.unit > 0
        return curved and perturbation.start is None and objective.theta.dtype != torch.float64

    def _until_good(
        self, objective: Objective, perturbation: Perturbation, coordinates: PriorWhitening, usual: int
    ) -> GoOn | None:
        """Beyond the usual iterations: on where the draws, (K, P), are not fair by then, until they are good."""
        if perturbation.start is None:
            return None
        bearable = _MOST_BYTES // (perturbation.start.numel() * perturbation.start.element_size())
        longest = min(self.max_iter, _LONGEST * usual, bearable)

        def go_on(solved: BlockSolution) -> bool:
            if solved.iterations >= longest:
                return False
            error = SampleANormErrors.solved(perturbation, objective.prior.precision, coordinates, solved).error
            wanted = FAIR if solved.iterations == usual else _GOOD
            return min(error.per_dimension, error.bound) > wanted

        return go_on
