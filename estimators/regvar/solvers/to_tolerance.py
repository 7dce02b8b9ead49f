"""LinearResponse until the error of the variance, measured at probes, is below a tolerance."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from estimators.curvature.krylov.block_cg import BlockSolution, check_condition
from estimators.curvature.krylov.block_lanczos import BlockLanczos
from estimators.curvature.krylov.krylov_space import KrylovSpace
from estimators.curvature.krylov.whitening import PriorWhitening
from estimators.numerics.reductions import inner, norms
from estimators.objective.objective import Objective
from estimators.persistence.checkpoint import Checkpoint
from estimators.persistence.state import Learned
from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.regvar.bounds import Bounds, LeadingSpace
from estimators.regvar.measured_bounds import MeasuredAccuracy
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.probe_rows import ProbeRows
from estimators.regvar.solvers.base import Solution, Solver, SolverReport

__all__ = ["LinearResponseToTolerance"]

_N_PROBES = 16
"""Probes: the root mean square of 16 errors has a standard error of 18 %."""
_KNOWN = 0.2
"""Relative error of the variance at the probes, in units of rtol, at which it counts as known."""
_GAP_PER_RTOL = 12.0
"""Relative distance of the bounds, in units of rtol, at which the probes are solved.

The error is 0.05 to 0.1 of the distance on the bundled tasks, so that an earlier measurement would be in vain; and the
larger the space, the fewer products the probes need.
"""
_SAFETY = 0.8
"""Fraction of rtol below which the measured error must be: the smallest of several measurements is too optimistic."""
_MAX_BIAS = 0.5
"""Largest relative bias between training rows and rows unlike them, in units of rtol.

Without it, the AUROC of held-out digits was off by up to .035 at an error below .04; docs/math.md, section 5, has the
products that other values would save.
"""
_ROUND_OFF = 8 * torch.finfo(torch.float64).eps
"""Relative error of the variance in float64, in units of the condition number of A.

Measured on float32 networks with raw inputs that are solved in float64, condition numbers 3e10 to 5e14, compared with
a singular value decomposition of the Jacobian: root mean squares of up to 15 eps times the condition number, mostly
below 3, and up to 100 at single rows. Products in float32 are limited by `check_condition`.
"""
_MIN_ITERATIONS = 3
"""Iterations before the probes are solved; the estimate needs a smaller leading space."""
_USEFUL_ITERATIONS = 12
"""Iterations that a space must have room for: smaller ones do not reach a useful accuracy on the bundled tasks."""
_PROBE_ITERATIONS = 4
"""Usual iterations of the probes' solution; room for them is kept free."""
_MAX_RANK = 2048
"""Largest number of vectors in the space: matrices of this size take seconds to factor."""
_MAX_BYTES = 2**31
"""Largest memory of the space, 2 GiB."""


class LinearResponseToTolerance(Solver):
    """Grows the Krylov space of all draws until the variance has a relative root-mean-square error of at most rtol.

    The error is measured at 16 probes, training rows and rows unlike them. The variance there is computed by conjugate
    gradients that continue from the space, in a branch that is dropped afterwards: a space that contained the probes
    would be more accurate there than at other rows. A space that spans all of θ gives the exact variance.

    Args:
        rtol: relative error to reach.
        seed: seed of the probes.
    """

    refits = False

    def __init__(self, rtol: float, seed: int = 0) -> None:
        self.rtol, self.seed = rtol, seed

    def __repr__(self) -> str:
        return f"LinearResponse to rtol={self.rtol:g}"

    @staticmethod
    def max_rank(objective: Objective) -> int:
        """Return the largest number of vectors that the space may have."""
        theta = objective.theta
        room = min(_MAX_BYTES, objective.available_bytes() // 3) // (theta.numel() * theta.element_size())
        return min(theta.numel(), _MAX_RANK, room)

    @classmethod
    def fits(cls, objective: Objective, n_draws: int) -> bool:
        """Return whether there is room for a space that can be measured."""
        enough = _USEFUL_ITERATIONS * n_draws + _PROBE_ITERATIONS * _N_PROBES
        return cls.max_rank(objective) >= min(enough, objective.theta.numel())

    def _solve(
        self,
        objective: Objective,
        perturbation: Perturbation,
        *,
        progress_bar: bool,  # noqa: ARG002
        checkpoint: Checkpoint,
    ) -> Solution:
        growth = _Growth.begun(self, objective, perturbation, checkpoint.load())
        while not growth.done():
            growth.extend()
            checkpoint.save(growth.state)
        return growth.solution(repr(self))


@dataclass
class _Growth:
    """The state of a solve.

    Args:
        ranks: every leading space so far.
        known: variance at the probes, and its relative uncertainty; None before they are solved.
        accuracy: error of the estimate from the present space; None before the probes are solved.
    """

    solver: LinearResponseToTolerance
    objective: Objective
    perturbation: Perturbation
    coordinates: PriorWhitening
    cycle: BlockLanczos
    max_rank: int
    ranks: list[LeadingSpace] = field(default_factory=list)
    known: tuple[list[float], list[float]] | None = None
    accuracy: MeasuredAccuracy | None = None

    @classmethod
    def begun(
        cls,
        solver: LinearResponseToTolerance,
        objective: Objective,
        perturbation: Perturbation,
        saved: Learned | None,
    ) -> Self:
        """Return the state at the initial guess, or the saved one."""
        coordinates = PriorWhitening.of(objective.prior.precision)
        product, free = coordinates.product(objective.product), objective.available_bytes
        common = (solver, objective, perturbation, coordinates)
        max_rank = solver.max_rank(objective)
        if saved is None:
            right_hand_sides = coordinates.whiten_rhs(perturbation.gradient)
            guess = coordinates.whiten(perturbation.initial_guess)
            residual = right_hand_sides.clone() if guess is None else product(guess).neg_().add_(right_hand_sides)
            cycle = BlockLanczos(product, residual, free_bytes=free)
            if not len(cycle.block):  # the guess is exact, as without curvature; bounds need a space all the same
                cycle.augment(right_hand_sides)
            return cls(*common, cycle, max_rank)
        device = perturbation.gradient.device
        tensors, values = {name: tensor.to(device) for name, tensor in saved[0].items()}, saved[1]
        ranks = [(rank, block) for rank, block in values["ranks"]]
        known = None if values["known"] is None else (values["known"][0], values["known"][1])
        return cls(*common, BlockLanczos.restored(product, tensors, free_bytes=free), max_rank, ranks, known)

    def state(self) -> Learned:
        """Return the tensors and values from which `begun` continues."""
        return self.cycle.tensors(), {"ranks": self.ranks, "known": self.known}

    def extend(self) -> None:
        """Add a block to the space."""
        self.cycle.extend()
        smallest = self.coordinates.unit if self.objective.data_term.semidefinite else 0.0
        check_condition(self.cycle.projected, smallest, self.objective.theta.dtype)
        self.ranks.append((self.cycle.rank, len(self.cycle.block)))

    def done(self) -> bool:
        """Measure the error if that is due; return whether it is at most rtol, or the space cannot grow further."""
        final = not len(self.cycle.block) or self._room() < 0
        if not final and len(self.ranks) < _MIN_ITERATIONS:
            return False
        earlier = min(self.ranks, key=lambda leading: abs(leading[0] - 2 * self.cycle.rank / 3))
        found = self._bounds_at_probes(earlier)
        known = self._variance_at_probes(*found[1], final=final)
        if known is None:
            return False
        leading, rtol = (earlier, self.ranks[-1]), self.solver.rtol
        measured = MeasuredAccuracy.of(leading, found, *known, self.probes.n_training)
        self.accuracy = replace(measured, round_off=self._round_off())
        reached = measured.relative_error <= _SAFETY * rtol and abs(measured.relative_bias) <= _MAX_BIAS * rtol
        return final or reached

    def _variance_at_probes(self, lower: Tensor, upper: Tensor, *, final: bool) -> tuple[Tensor, Tensor] | None:
        """Return the variance at the probes and its relative uncertainty, (m,) each; None if it is too early."""
        gap, rtol = 2 * (upper - lower) / (upper + lower), self.solver.rtol
        if not len(gap):  # every gradient was 0
            return lower, gap
        middle, half = 0.5 * (lower + upper), 0.5 * gap
        if self.known is None and float(gap.max()) <= _KNOWN * rtol:  # the bounds are enough
            return middle, half
        if self.known is None:
            reserved = _PROBE_ITERATIONS * len(self.probes.gradients)
            if not final and float(gap.mean()) > _GAP_PER_RTOL * rtol and self._room() >= reserved:
                return None
            variance, uncertainty = self._solved_probes()
            self.known = (variance.tolist(), uncertainty.tolist())
        variance, uncertainty = (torch.tensor(values).to(lower) for values in self.known)
        narrow = half < uncertainty  # the space has outgrown the solution
        return torch.where(narrow, middle, variance), torch.where(narrow, half, uncertainty)

    @cached_property
    def probes(self) -> ProbeRows:
        """The rows at which the error is measured."""
        with self.objective.network.pass_counter.phase("probes"):
            return ProbeRows.of(self.objective, _N_PROBES, self.solver.seed)

    def _room(self) -> int:
        """Return how many more vectors the space may have; unlimited if it may span all of θ."""
        if self.max_rank == self.objective.theta.numel():
            return self.max_rank
        return self.max_rank - self.cycle.rank - len(self.cycle.block)

    def _round_off(self) -> float:
        """Return the relative error that round-off in float64 may cause at rows other than the probes."""
        unit = self.coordinates.unit
        if self.objective.theta.dtype != torch.float64 or unit <= 0:
            return 0.0
        return _ROUND_OFF * float(torch.linalg.eigvalsh(self.cycle.projected)[-1]) / unit

    def _bounds_at_probes(self, earlier: LeadingSpace) -> list[Bounds]:
        """Return the bounds at the probes, from a leading space and the whole space."""
        assert self.perturbation.bounds_of is not None
        bounds = self.perturbation.bounds_of(self._space(), [earlier])
        return bounds.variances_of_gradients(self.probes.gradients)

    def _solved_probes(self) -> tuple[Tensor, Tensor]:
        """Return the variance gᵀA⁻¹g at the probes and its relative uncertainty, (m,) each.

        Galerkin's lower bound l rises by Δ per iteration. It rises about geometrically, so that Δ²/(Δ′ − Δ) is left,
        with Δ′ the rise before.
        """
        right_hand_sides = self.coordinates.whiten_rhs(self.probes.gradients)
        with self.objective.network.pass_counter.phase("probes"), self.cycle.branch(right_hand_sides) as branch:
            found = [_quadratic_forms(branch, right_hand_sides)]
            left = torch.full_like(found[0], torch.inf)
            while len(branch.block) and float((left / found[-1]).square().mean().sqrt()) > _KNOWN * self.solver.rtol:
                if branch.rank + len(branch.block) > self.max_rank:
                    break  # no room: what is left says how uncertain the variance is
                branch.extend()
                found.append(_quadratic_forms(branch, right_hand_sides))
                left = _expected_rise(found)
            if not len(branch.block):
                left = torch.zeros_like(left)
        left = torch.where(torch.isfinite(left), left, found[-1])
        return found[-1] + left, left / found[-1]

    def _space(self) -> KrylovSpace:
        cycle = self.cycle
        small = (cycle.projected, cycle.full_coupling())
        return KrylovSpace.whitened(cycle.extended, *small, self.coordinates, self.objective.prior.precision)

    def solution(self, name: str) -> Solution:
        """Return the solution for the draws, with the space and its accuracy."""
        cycle, delta = self.cycle, self.objective.prior.precision
        cycle.solve()
        solution, guess = cycle.correction(), self.coordinates.whiten(self.perturbation.initial_guess)
        solution = solution if guess is None else solution.add_(guess)
        residuals = cycle.residual_norms() / norms(self.coordinates.whiten_rhs(self.perturbation.gradient))
        small = (cycle.projected, cycle.full_coupling())
        solved = BlockSolution(
            solution, cycle.residual_coefficients, residuals, len(self.ranks), cycle.products, cycle.extended, *small
        )
        report = SolverReport(
            name,
            n_perturbations=len(self.perturbation.gradient),
            iterations=solved.iterations,
            residual=float(solved.residuals.max()),
        )
        errors = SampleANormErrors.from_block_cg(self.perturbation, delta, self.coordinates, solved)
        return Solution(self.coordinates.unwhiten_(solution), report, errors, self._space(), self.accuracy)


def _quadratic_forms(cycle: BlockLanczos, vectors: Tensor) -> Tensor:
    """Return bᵀ Wᵀ T⁻¹ W b for each of `vectors` b, (m,): lower bounds of bᵀA⁻¹b."""
    projected = inner(cycle.basis, vectors)  # W b
    forms: Tensor = (projected * torch.linalg.solve(cycle.projected, projected)).sum(0)
    return forms


def _expected_rise(found: list[Tensor]) -> Tensor:
    """Return by how much a sequence of lower bounds (m,) is expected to rise further; infinite for fewer than three."""
    if len(found) < 3:
        return torch.full_like(found[-1], torch.inf)
    before, last = (found[-2] - found[-3]).clamp_min(0), (found[-1] - found[-2]).clamp_min(0)
    return torch.where(last < before, last.square() / (before - last).clamp_min(torch.finfo(last.dtype).tiny), last)
