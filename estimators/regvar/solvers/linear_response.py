"""LinearResponse: the limit λ → 0, by block conjugate gradients."""

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
from estimators.regvar.a_norm_error import CONVERGED, SampleANormErrors
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.solvers.base import Solution, Solver, SolverReport

__all__ = ["LinearResponse"]

_ENERGY_TOL = 1e-3  # relative error of ∇rᵀu in float32, well below the errors of Monte Carlo and of the dtype
_TARGET_ERROR = 0.1  # A-norm error per dimension to reach, for draws that are above CONVERGED at their usual end
_MAX_EXTENSION = 4  # times the usual number of iterations that such draws get at most
_MAX_SPACE_BYTES = 2**31  # memory of the Krylov space up to which they get them


class LinearResponse(Solver):
    """Solves A u = ∇r for all functions r_k in one Krylov space; it is the limit λ → 0 of refits, and has no λ.

    Block conjugate gradients, started at the perturbation's initial guess, in coordinates in which the prior is a
    multiple of the identity: √δ θ for several δ. The Krylov space is part of the solution: PosteriorDraws computes
    bounds of the variance from it.

    Source: the derivative in McInerney & Kallus, AISTATS 2025, Theorem 4.1, without the finite difference.

    Args:
        tol: relative residual ‖A u − ∇r‖ / ‖∇r‖ to reach. None: 1e-10 in float64, and 1e-5 in float32. With the GGN in
            float32 it suffices that ‖A u − ∇r‖² ≤ 1e-3 ∇rᵀu in the coordinates of the prior, so that ∇rᵀu (for
            Pointwise: the variance) has a relative error of at most 1e-3. Posterior draws are noisy anyway: with None
            they get a fixed number of products with A. If their A-norm error exceeds 0.5 after these, they get up to
            four times as many, while the Krylov space takes at most 2 GiB.
        max_iter: maximal number of block iterations, each one product with A per function r_k.
        basis_dtype: dtype of the Krylov space kept with the fit: torch.float16 or torch.bfloat16 halves its memory and
            the file; None keeps the dtype of the solve. On digits the variance changes by 4e-4 and 3e-3.

    Raises:
        OptionError: at construction, if an argument has another type or value.
        ConvergenceError: if `tol` is not reached after `max_iter` iterations.
        IndefiniteHessianError: if A has a negative eigenvalue in the Krylov space.
        IllConditionedError: if float32 products are not accurate enough; RegVar then solves in float64.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from estimators import LinearResponse, RegVar
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> loader = DataLoader(TensorDataset(x, x.sin()), batch_size=10)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> regvar = RegVar(model, "regression", solver=LinearResponse(tol=1e-4)).fit(loader)
        >>> regvar.variance(x[:3]).shape
        torch.Size([3, 1])
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
        basis = "" if self.basis_dtype is None else f", basis_dtype={self.basis_dtype}"
        return f"LinearResponse(tol={self.tol}, max_iter={self.max_iter}{basis})"

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
            n_perturbations=len(perturbation.gradient),
            iterations=solved.iterations,
            residual=float(solved.residuals.max()),
        )
        a_norm_errors = None
        if perturbation.initial_guess is not None:
            a_norm_errors = SampleANormErrors.from_block_cg(perturbation, delta, coordinates, solved)
        displacement, space = coordinates.back_(solved.solution), None
        if coordinates.unit > 0 and solved.iterations:
            space = KrylovSpace.of(solved, coordinates, delta, self.basis_dtype)
        return Solution(displacement, report, a_norm_errors, space)

    def _solved(
        self, objective: Objective, perturbation: Perturbation, coordinates: PriorWhitening, checkpoint: Checkpoint
    ) -> BlockSolution:
        """Return ũ with (s A s) ũ = s ∇r, where u = s ũ and s whitens the prior."""
        max_products = perturbation.max_products if self.tol is None else None
        # One product was spent on the residual of the initial guess.
        max_iter = self.max_iter if max_products is None else min(self.max_iter, max(1, max_products - 1))
        error_is_bounded = self.tol is None and self._error_is_bounded(objective, perturbation, coordinates)
        return block_cg(
            coordinates.product(objective.product),
            coordinates.right(perturbation.gradient),
            start=coordinates.into(perturbation.initial_guess),
            tol=default_tolerance(objective.theta.dtype) if self.tol is None else self.tol,
            energy_tol=_ENERGY_TOL * coordinates.unit if error_is_bounded else 0.0,
            max_iter=max_iter,
            must_converge=max_products is None,
            go_on=None
            if max_products is None
            else self._until_converged(objective, perturbation, coordinates, max_iter),
            checkpoint=checkpoint,
            free=objective.available_bytes,
            smallest=coordinates.unit if objective.data_term.semidefinite else 0.0,
        )

    def _error_is_bounded(self, objective: Objective, perturbation: Perturbation, coordinates: PriorWhitening) -> bool:
        """Whether the residual bounds the error of ∇rᵀu.

        With A ⪰ unit and u started at zero, ∇rᵀ(A⁻¹∇r − u) = rᵀA⁻¹r ≤ ‖r‖²/unit for the residual r = ∇r − A u.
        """
        semidefinite = objective.data_term.semidefinite and coordinates.unit > 0
        return semidefinite and perturbation.initial_guess is None and objective.theta.dtype != torch.float64

    def _until_converged(
        self, objective: Objective, perturbation: Perturbation, coordinates: PriorWhitening, usual_iterations: int
    ) -> GoOn | None:
        """Return the condition to continue beyond the usual iterations, for draws that have not converged by then."""
        if perturbation.initial_guess is None:
            return None
        in_memory = _MAX_SPACE_BYTES // (perturbation.initial_guess.numel() * perturbation.initial_guess.element_size())
        max_iter = min(self.max_iter, _MAX_EXTENSION * usual_iterations, in_memory)

        def go_on(solved: BlockSolution) -> bool:
            if solved.iterations >= max_iter:
                return False
            error = SampleANormErrors.from_block_cg(perturbation, objective.prior.precision, coordinates, solved).error
            wanted = CONVERGED if solved.iterations == usual_iterations else _TARGET_ERROR
            return min(error.per_dimension, error.bound) > wanted

        return go_on
