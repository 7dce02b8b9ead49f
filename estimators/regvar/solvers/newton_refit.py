"""NewtonRefit: the full-batch refit to high precision, for verification.

F_a, the objective of perturbed copy a, and its displacement D are defined in `perturbed_copies`; ‖∇F_a‖ / ‖∇r_a‖ is
‖∇(L − λ s_a r_a)‖ / (λ ‖∇r_a‖). A is the posterior precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from estimators.curvature.dense import cholesky as dense
from estimators.curvature.dense.cholesky import DensePrecision
from estimators.errors import ConvergenceError, IndefiniteHessianError, LambdaTooLargeError
from estimators.objective.objective import Objective
from estimators.option_checks import checked_choice, checked_integer, checked_number
from estimators.persistence.checkpoint import Checkpoint
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.solvers.base import Solution, Solver, SolverReport, checked_lam
from estimators.regvar.solvers.newton_copies import NewtonCopies
from estimators.regvar.solvers.perturbed_copies import checked_difference
from estimators.runtime.progress import track

__all__ = ["InnerSolution", "NewtonRefit", "conjugate_gradients"]

_MAX_DENSE = 2048  # parameters up to which the preconditioner is a dense Cholesky factor
_INNER_TOL = 1e-3  # relative residual of the inner solves: the outer iteration then converges linearly by this factor
_MAX_DISTANCE = 3  # times the first step: further away, the refit does not return to the optimum of θ̂
_STALLED = 1e-3  # relative gradient below which two steps without progress mean that round-off is reached

Apply = Callable[[Tensor], Tensor]


class NewtonRefit(Solver):
    """Refits argmin L − λ r by damped Newton steps on all rows, with Hessian products and conjugate gradients.

    For verification: it solves the refit of the paper to high precision. Small networks precondition the inner solves
    with the Cholesky factor of A at θ̂; the stopping rule uses only the gradient of the refit's own objective.

    Source: the finite-difference form of McInerney & Kallus, AISTATS 2025, Theorem 4.1.

    Args:
        lam: λ > 0, the step of the finite difference.
        difference: "forward" (f(θ_λ) − f(θ̂), error of first order in λ) or "central" (f(θ_λ) − f(θ_−λ), second order).
        tol: stopping rule ‖∇(L − λr)‖ ≤ tol · λ ‖∇r‖. Round-off can stop the refit earlier; the report's `residual`
            has the value reached.
        max_iter: maximal number of Newton steps.
        preconditioner: "auto" (dense up to 2048 parameters) or None.

    Raises:
        OptionError: at construction, if an argument has another type or value.
        LambdaTooLargeError: if a refit ends further from its first Newton step than that step is long.
        ConvergenceError: if the gradient is still large after `max_iter` steps.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from estimators import NewtonRefit, Pointwise, RegVar
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> loader = DataLoader(TensorDataset(x.double(), x.double().sin()), batch_size=10)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> regvar = RegVar(model.double(), "regression",
        ...                 regularizer=Pointwise(), solver=NewtonRefit()).fit(loader)
        >>> regvar.variance(x[:3].double()).shape
        torch.Size([3, 1])
    """

    refits = True

    def __init__(
        self,
        lam: float = 1e-4,
        difference: str = "central",
        *,
        tol: float = 1e-9,
        max_iter: int = 30,
        preconditioner: str | None = "auto",
    ) -> None:
        self.lam, self.difference = float(checked_lam(lam, auto=False)), checked_difference(difference)
        self.tol = checked_number("tol", tol, above=0, remedy="1e-9.")
        self.max_iter = checked_integer("max_iter", max_iter, at_least=1, remedy="30.")
        self.preconditioner = checked_choice("preconditioner", preconditioner, ("auto", None))

    def __repr__(self) -> str:
        return f"NewtonRefit(lam={self.lam:g}, difference={self.difference!r})"

    def _solve(
        self,
        objective: Objective,
        perturbation: Perturbation,
        *,
        progress_bar: bool,
        checkpoint: Checkpoint,  # noqa: ARG002
    ) -> Solution:
        copies = NewtonCopies.of(
            objective, perturbation, self.lam, difference=self.difference, chunk_size=objective.network.vectors_per_call
        )
        search = _Search(copies, self._preconditioner(objective))
        centred = _is_centred(objective, perturbation, self.lam)
        for _ in track(range(self.max_iter), "Newton steps", shown=progress_bar):
            if search.finished(self.tol) or (centred and float(search.distance().max()) > _MAX_DISTANCE):
                break
            search.step()
        self._check(search, centred=centred)
        return Solution(copies.difference_quotient(search.displacements), self._report(search))

    def _preconditioner(self, objective: Objective) -> Apply | None:
        """Return v -> A⁻¹v of a small network, or None."""
        theta = objective.theta
        needed = dense.bytes_needed(theta.numel(), theta.element_size())
        if self.preconditioner is None or theta.numel() > _MAX_DENSE or needed > objective.available_bytes() // 2:
            return None
        matrix = objective.product(torch.eye(theta.numel(), dtype=theta.dtype, device=theta.device))
        try:
            return DensePrecision(0.5 * (matrix + matrix.T)).solve
        except IndefiniteHessianError:  # possible only if the objective is not centred; the damping handles it
            return None

    def _check(self, search: _Search, *, centred: bool) -> None:
        """Raise LambdaTooLargeError or ConvergenceError if the refit is not the one near θ̂."""
        residual = float(search.relative().max())
        distance = float(search.distance().max())
        if centred and distance > 1:
            raise LambdaTooLargeError(
                "a refit that moves about as far as its first Newton step",
                received=f"one at lam={self.lam:g} that ends {distance:.3g} times that step away from it",
                remedy=f"a smaller lam, for instance {self.lam / 10:g}.",
            )
        if not bool((search.stalled | (search.relative() <= self.tol)).all()):
            raise ConvergenceError(
                f"a gradient of at most {self.tol:g}·λ‖∇r‖ within {self.max_iter} Newton steps",
                received=f"{residual:.3g}·λ‖∇r‖ at lam={self.lam:g}",
                remedy="a smaller lam if the refit left the basin of the optimum, a larger one or float64 if round-off "
                "dominates; or a larger max_iter.",
            )

    def _report(self, search: _Search) -> SolverReport:
        return SolverReport(
            repr(self),
            n_perturbations=len(search.copies.perturbation.gradient),
            lam=self.lam,
            iterations=search.iterations,
            residual=float(search.relative().max()),
        )


class _Search:
    """Newton steps with Levenberg–Marquardt damping; each copy has its own damping, and its gradient norm must fall."""

    def __init__(self, copies: NewtonCopies, precondition: Apply | None) -> None:
        self.copies, self.precondition = copies, precondition
        self.displacements = copies.initial_guess
        self.gradient = copies.gradient(self.displacements)
        norms = copies.perturbation.gradient.norm(dim=1)
        norms = torch.where(norms > 0, norms, torch.inf)  # r without a gradient: nothing to solve
        self.scale = norms[torch.arange(len(self.displacements), device=norms.device) % len(norms)]
        self.damping, self.idle = torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        self.first: Tensor | None = None
        self.iterations = 0

    def relative(self) -> Tensor:
        """Return ‖∇F‖ / ‖∇r‖ per copy, (n_copies,)."""
        relative: Tensor = self.gradient.norm(dim=1) / self.scale
        return relative

    @property
    def stalled(self) -> Tensor:
        """Whether round-off prevents further progress, per copy, (n_copies,)."""
        return (self.idle >= 2) & (self.relative() <= _STALLED)

    def finished(self, tol: float) -> bool:
        """Return whether every copy has converged or stalled."""
        return bool((self.stalled | (self.relative() <= tol)).all())

    def distance(self) -> Tensor:
        """Return ‖D − D₁‖ / ‖D₁‖ per copy, D₁ the displacement after the first step; 0 before it."""
        if self.first is None:
            return torch.zeros_like(self.scale)
        length = self.first.norm(dim=1).clamp_min(torch.finfo(self.displacements.dtype).tiny)
        distance: Tensor = (self.displacements - self.first).norm(dim=1) / length
        return torch.where(self.scale.isinf(), 0.0, distance)

    def step(self) -> None:
        """Try one Newton step of every copy."""
        inner = conjugate_gradients(
            lambda v: self.copies.product(self.displacements, v) + self.damping[:, None] * v,
            -self.gradient,
            precondition=self.precondition,
            tol=_INNER_TOL,
            max_iter=min(500, 2 * self.displacements.shape[1]),
        )
        proposal = self.displacements + inner.solution
        gradient = self.copies.gradient(proposal)
        self.iterations += 1
        ratio = gradient.norm(dim=1) / self.gradient.norm(dim=1)
        self.idle = torch.where(ratio < 0.5, 0.0, self.idle + 1)  # NaN counts as idle
        self._move((ratio < 1) & ~inner.negative_curvature, proposal, gradient, inner.curvature)

    def _move(self, accepted: Tensor, proposal: Tensor, gradient: Tensor, curvature: Tensor) -> None:
        """Move the accepted copies, and adapt the damping of all."""
        if self.first is None:
            self.first = proposal
        self.displacements = torch.where(accepted[:, None], proposal, self.displacements)
        self.gradient = torch.where(accepted[:, None], gradient, self.gradient)
        floor = 1e-3 * curvature  # the first damping: a thousandth of the curvature along the gradient
        relaxed = torch.where(self.damping > floor, self.damping / 10, 0.0)
        self.damping = torch.where(accepted, relaxed, torch.maximum(10 * self.damping, floor))


def _is_centred(objective: Objective, perturbation: Perturbation, lam: float) -> bool:
    """Return whether ∇L(θ̂) is small relative to λ∇r; refits of a loss that is not centred may move far."""
    slope, norms = objective.gradient(objective.theta).norm(), perturbation.gradient.norm(dim=1)
    return not bool((slope > 1e-3 * lam * norms[norms > 0]).any())


@dataclass(frozen=True)
class InnerSolution:
    """Result of conjugate gradients on one system per copy.

    Args:
        solution: (n_copies, P); with negative curvature, the iterate before that curvature was found.
        negative_curvature: whether it was found, (n_copies,).
        curvature: absolute Rayleigh quotient along the first search direction, (n_copies,).
        iterations: number of iterations.
    """

    solution: Tensor
    negative_curvature: Tensor
    curvature: Tensor
    iterations: int


def conjugate_gradients(
    product: Apply, rhs: Tensor, *, precondition: Apply | None, tol: float, max_iter: int
) -> InnerSolution:
    """Solve H_a u_a = b_a for rhs b (n_copies, P) to ‖b − H u‖ ≤ tol ‖b‖, or to negative curvature (Steihaug 1983)."""
    precondition = precondition or (lambda v: v)
    u, residual = torch.zeros_like(rhs), rhs
    z = precondition(residual)
    direction, rho = z, _dot(residual, z)
    target = tol * rhs.norm(dim=1)
    negative = torch.zeros_like(target, dtype=torch.bool)
    curvature, iterations = torch.zeros_like(target), 0
    active = residual.norm(dim=1) > target
    while iterations < max_iter and bool(active.any()):
        image = product(direction)
        curvature_along = _dot(direction, image)
        if iterations == 0:
            curvature = curvature_along.abs() / _dot(direction, direction).clamp_min(torch.finfo(rhs.dtype).tiny)
        negative |= active & ~(curvature_along > 0)
        active &= curvature_along > 0
        step = torch.where(active, rho / torch.where(active, curvature_along, 1.0), 0.0)[:, None]
        u, residual = u + step * direction, residual - step * image
        z = precondition(residual)
        rho_next = _dot(residual, z)
        direction = z + torch.where(active, rho_next / torch.where(active, rho, 1.0), 0.0)[:, None] * direction
        rho = rho_next
        iterations += 1
        active &= residual.norm(dim=1) > target
    return InnerSolution(u, negative, curvature, iterations)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each row of a and b, (n_copies,)."""
    return (a * b).sum(1)
