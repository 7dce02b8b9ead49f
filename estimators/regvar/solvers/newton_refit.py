"""Newton refit: the full-batch refit to high precision, the route of verification."""

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
from estimators.regvar.solvers.perturbed_copies import PerturbedCopies, checked_difference
from estimators.runtime.progress import track

__all__ = ["InnerSolution", "NewtonRefit", "conjugate_gradients"]

_DENSE_BELOW = 2048
_FORCING = 1e-3  # relative residual of the inner solves: the outer convergence is then linear with this factor
_LOST = 3  # first steps away from the first step: no way back to the optimum that θ̂ belongs to
_STALLED = 1e-3  # two steps that gain nothing, below this residual, have met round-off

Apply = Callable[[Tensor], Tensor]


class NewtonRefit(Solver):
    """argmin L − λ r by damped Newton steps, full batch, matrix-free: Hessian products and conjugate gradients.

    Small networks precondition the inner solves with the Cholesky factor of A at θ̂; the stopping rule looks at the
    gradient of the refit's own objective alone.

    Args:
        lam: λ. difference: "forward" (first order in λ), "central" (second order), "control".
        tol: ‖∇(L − λr)‖ ≤ tol · λ ‖∇r‖; round-off may stop it earlier, which the report's `residual` shows.
        max_iter: Newton steps.
        preconditioner: "auto" (dense below 2048 parameters) or None.

    Errors: LambdaTooLargeError where a refit ends further from its first Newton step than that step is long;
    ConvergenceError where the gradient is still large after max_iter steps.
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
        replicas = PerturbedCopies.of(
            objective, perturbation, self.lam, difference=self.difference, at_once=objective.network.vectors_at_once
        )
        search = _Search(replicas, self._preconditioner(objective))
        centred = _is_centred(objective, perturbation, self.lam)
        for _ in track(range(self.max_iter), "Newton steps", shown=progress_bar):
            if search.finished(self.tol) or (centred and float(search.departure().max()) > _LOST):
                break
            search.step()
        self._judge(search, centred=centred)
        return Solution(replicas.displacement(search.arms), self._report(search))

    def _preconditioner(self, objective: Objective) -> Apply | None:
        theta = objective.theta
        needed = dense.bytes_needed(theta.numel(), theta.element_size())
        if self.preconditioner is None or theta.numel() > _DENSE_BELOW or needed > objective.available_bytes() // 2:
            return None
        matrix = objective.product(torch.eye(theta.numel(), dtype=theta.dtype, device=theta.device))
        try:
            return DensePrecision(0.5 * (matrix + matrix.T)).solve
        except IndefiniteHessianError:  # only met where the objective is not centred: the damping copes
            return None

    def _judge(self, search: _Search, *, centred: bool) -> None:
        residual = float(search.relative().max())
        departure = float(search.departure().max())
        if centred and departure > 1:
            raise LambdaTooLargeError(
                "a refit that moves about as far as its first Newton step",
                received=f"one at lam={self.lam:g} that ends {departure:.3g} times that step away from it",
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
            replicas=len(search.replicas.perturbation.direction),
            lam=self.lam,
            iterations=search.iterations,
            residual=float(search.relative().max()),
        )


class _Search:
    """Levenberg–Marquardt-damped Newton steps, each arm with its own damping μ; merit: the norm of the gradient."""

    def __init__(self, replicas: PerturbedCopies, precondition: Apply | None) -> None:
        self.replicas, self.precondition = replicas, precondition
        self.arms = replicas.start
        self.gradient = replicas.gradient(self.arms)
        norms = replicas.perturbation.direction.norm(dim=1)
        norms = torch.where(norms > 0, norms, torch.inf)  # without a slope there is nowhere to go
        self.scale = norms[torch.arange(len(self.arms), device=norms.device) % len(norms)]
        self.damping, self.idle = torch.zeros_like(self.scale), torch.zeros_like(self.scale)
        self.first: Tensor | None = None
        self.iterations = 0

    def relative(self) -> Tensor:
        """‖∇F‖ / ‖∇r‖, (A,)."""
        relative: Tensor = self.gradient.norm(dim=1) / self.scale
        return relative

    @property
    def stalled(self) -> Tensor:
        """Arms that round-off keeps from going on, (A,)."""
        return (self.idle >= 2) & (self.relative() <= _STALLED)

    def finished(self, tol: float) -> bool:
        return bool((self.stalled | (self.relative() <= tol)).all())

    def departure(self) -> Tensor:
        """‖D − D₁‖ / ‖D₁‖, D₁ the end of the first step; 0 before one was made."""
        if self.first is None:
            return torch.zeros_like(self.scale)
        length = self.first.norm(dim=1).clamp_min(torch.finfo(self.arms.dtype).tiny)
        departure: Tensor = (self.arms - self.first).norm(dim=1) / length
        return torch.where(self.scale.isinf(), 0.0, departure)

    def step(self) -> None:
        inner = conjugate_gradients(
            lambda v: self.replicas.product(self.arms, v) + self.damping[:, None] * v,
            -self.gradient,
            precondition=self.precondition,
            tol=_FORCING,
            max_iter=min(500, 2 * self.arms.shape[1]),
        )
        proposal = self.arms + inner.solution
        gradient = self.replicas.gradient(proposal)
        self.iterations += 1
        ratio = gradient.norm(dim=1) / self.gradient.norm(dim=1)
        self.idle = torch.where(ratio < 0.5, 0.0, self.idle + 1)  # NaN counts as idle
        self._move((ratio < 1) & ~inner.negative_curvature, proposal, gradient, inner.curvature)

    def _move(self, accepted: Tensor, proposal: Tensor, gradient: Tensor, curvature: Tensor) -> None:
        if self.first is None:
            self.first = proposal
        self.arms = torch.where(accepted[:, None], proposal, self.arms)
        self.gradient = torch.where(accepted[:, None], gradient, self.gradient)
        floor = 1e-3 * curvature  # the first damping: a thousandth of the curvature along the gradient
        relaxed = torch.where(self.damping > floor, self.damping / 10, 0.0)
        self.damping = torch.where(accepted, relaxed, torch.maximum(10 * self.damping, floor))


def _is_centred(objective: Objective, perturbation: Perturbation, lam: float) -> bool:
    """Whether ∇L(θ̂) is small beside λ∇r: a refit of the trained loss itself drifts, and may go far."""
    slope, norms = objective.gradient(objective.theta).norm(), perturbation.direction.norm(dim=1)
    return not bool((slope > 1e-3 * lam * norms[norms > 0]).any())


@dataclass(frozen=True)
class InnerSolution:
    """`solution` (A, P); where `negative_curvature` (A,) is true it is the iterate before that curvature was met.

    `curvature` (A,): the size of the Rayleigh quotient along the first direction.
    """

    solution: Tensor
    negative_curvature: Tensor
    curvature: Tensor
    iterations: int


def conjugate_gradients(
    product: Apply, rhs: Tensor, *, precondition: Apply | None, tol: float, max_iter: int
) -> InnerSolution:
    """H_a u_a = b_a for rhs (A, P) to ‖b − H u‖ ≤ tol ‖b‖ or to negative curvature (Steihaug 1983)."""
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
        bend = _dot(direction, image)
        if iterations == 0:
            curvature = bend.abs() / _dot(direction, direction).clamp_min(torch.finfo(rhs.dtype).tiny)
        negative |= active & ~(bend > 0)
        active &= bend > 0
        step = torch.where(active, rho / torch.where(active, bend, 1.0), 0.0)[:, None]
        u, residual = u + step * direction, residual - step * image
        z = precondition(residual)
        rho_next = _dot(residual, z)
        direction = z + torch.where(active, rho_next / torch.where(active, rho, 1.0), 0.0)[:, None] * direction
        rho = rho_next
        iterations += 1
        active &= residual.norm(dim=1) > target
    return InnerSolution(u, negative, curvature, iterations)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)
