"""LinearResponse until the error of the variance, measured at probes, is below a tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from estimators.curvature.krylov.block_cg import BlockSolution, check_condition
from estimators.curvature.krylov.block_lanczos import BlockLanczos
from estimators.curvature.krylov.krylov_space import KrylovSpace
from estimators.curvature.krylov.whitening import PriorWhitening
from estimators.numerics.reductions import norms
from estimators.objective.objective import Objective
from estimators.persistence.checkpoint import Checkpoint
from estimators.persistence.state import Learned
from estimators.regvar.a_norm_error import SampleANormErrors
from estimators.regvar.bounds import LeadingSpace
from estimators.regvar.measured_bounds import MeasuredAccuracy
from estimators.regvar.perturbation import Perturbation
from estimators.regvar.probe_rows import ProbeRows
from estimators.regvar.solvers.base import Solution, Solver, SolverReport
from estimators.regvar.solvers.probe_variance import variance_of_gradients

__all__ = ["LinearResponseToTolerance", "round_off"]

_N_PROBES = 8
"""Probes while the space grows."""
_N_FRESH_PROBES = 16
"""Fresh probes that confirm what these have measured: the first measurement that is low enough tends to be too low.

The root mean square of all 24 errors has a standard error of 14 %.
"""
_KNOWN = 0.2
"""Relative error of the variance at the probes, in units of rtol, at which it counts as known."""
_GAP_PER_RTOL = 12.0
"""Relative distance of the bounds, in units of rtol, at which the probes are solved.

The error is 0.05 to 0.1 of the distance on the bundled tasks, so that an earlier measurement would be in vain; and the
larger the space, the fewer products the probes need.
"""
_LATEST_RANK = 256
"""Number of vectors from which all probes are solved at any distance, by half as many products as the space took.

Where the prior makes up much of the variance, the bounds stay far apart around an accurate estimate: docs/math.md,
section 5, has the products that this saves.
"""
_GROWTH_PER_ATTEMPT = 1.5
"""Growth of the space until the probes are solved again at such a distance, if these products were too few."""
_SAFETY = 0.8
"""Fraction of rtol below which the measured error must be: it is uncertain itself."""
_MAX_BIAS = 1.0
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
_MEASURED_GROWTH = 1.1
"""Growth of a large space between measurements of its error, each of which factors matrices of its rank."""
_USUAL_ITERATIONS = 4
"""Iterations that the probes need at most where the bounds are close."""
_PROBE_VECTORS = _USUAL_ITERATIONS * (_N_PROBES + _N_FRESH_PROBES)
"""Vectors of these iterations for all probes; room for them is kept free."""
_MAX_RANK = 2048
"""Largest number of vectors in the space: matrices of this size take seconds to factor."""
_MAX_BYTES = 2**31
"""Largest memory of the space, 2 GiB."""


def round_off(condition: float) -> float:
    """Return the relative error of a variance in float64 that the condition number of A may cause."""
    return _ROUND_OFF * condition


class LinearResponseToTolerance(Solver):
    """Grows the Krylov space of all draws until the variance has a relative root-mean-square error of at most rtol.

    The error is measured at eight probes, training rows and rows unlike them. The variance there is computed by
    conjugate gradients that continue from the space, in a branch that is dropped afterwards: a space that contained
    the probes would be more accurate there than at other rows. Once the error is small enough, 16 fresh probes must
    confirm it; all 24 measure it from then on, and in large spaces from the beginning. A space that spans all of θ
    gives the exact variance.

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
        enough = _USEFUL_ITERATIONS * n_draws + _PROBE_VECTORS
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
        solved_from: rank from which the probes are solved at any distance of the bounds.
        ranks: every leading space so far.
        probes: the rows at which the error is measured; None before that is due.
        fresh: whether they contain the fresh ones.
        known: variance at the first of them, as far as it has been solved for, and its relative uncertainty.
        accuracy: error of the estimate from the present space; None before the probes are solved.
    """

    solver: LinearResponseToTolerance
    objective: Objective
    perturbation: Perturbation
    coordinates: PriorWhitening
    cycle: BlockLanczos
    max_rank: int
    solved_from: int
    ranks: list[LeadingSpace] = field(default_factory=list)
    probes: ProbeRows | None = None
    fresh: bool = False
    known: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
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
            return cls(*common, cycle, max_rank, _LATEST_RANK)
        device = perturbation.gradient.device
        tensors, values = {name: tensor.to(device) for name, tensor in saved[0].items()}, saved[1]
        ranks = [(rank, block) for rank, block in values["ranks"]]
        cycle, known = (
            BlockLanczos.restored(product, tensors, free_bytes=free),
            (values["known"][0], values["known"][1]),
        )
        return cls(*common, cycle, max_rank, values["solved_from"], ranks, fresh=values["fresh"], known=known)

    def state(self) -> Learned:
        """Return the tensors and values from which `begun` continues."""
        values = {"ranks": self.ranks, "fresh": self.fresh, "solved_from": self.solved_from, "known": self.known}
        return self.cycle.tensors(), values

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
        if not final and not (self._has_last_room() and not self.fresh) and not self._has_grown():
            return False
        if self._has_last_room() or self.cycle.rank >= self.solved_from:
            self._want_fresh_probes()
        self.accuracy = self._measured(final=final)
        if not self.fresh and not final and self._reached():  # fresh probes must confirm it
            self._want_fresh_probes()
            self.accuracy = self._measured(final=final)
        return self.accuracy is not None and (final or self._reached())

    def _has_grown(self) -> bool:
        """Return whether a measurement is due: at ranks on a geometric grid, which are all ranks of a small space.

        It depends on the ranks alone, so that a fit that continues from a checkpoint measures at the same ranks.
        """
        before, now = (math.floor(math.log(rank, _MEASURED_GROWTH)) for rank, _ in self.ranks[-2:])
        return now > before

    def _want_fresh_probes(self) -> None:
        self.solved_from = min(self.solved_from, self.cycle.rank)
        if not self.fresh:
            self.fresh, self.probes = True, None

    def _reached(self) -> bool:
        """Return whether the measured error is small enough, and alike at training rows and at others."""
        if self.accuracy is None:
            return False
        error, bias, rtol = self.accuracy.relative_error, self.accuracy.relative_bias, self.solver.rtol
        return error <= _SAFETY * rtol and abs(bias) <= _MAX_BIAS * rtol

    def _measured(self, *, final: bool) -> MeasuredAccuracy | None:
        """Return the accuracy at the probes; None if it is too early to solve for the variance there."""
        if self.probes is None:
            self.probes = self._chosen_probes()
        earlier = min(self.ranks, key=lambda leading: abs(leading[0] - 2 * self.cycle.rank / 3))
        assert self.perturbation.bounds_of is not None
        bounds = self.perturbation.bounds_of(self._space(), [earlier])
        found = bounds.variances_of_gradients(self.probes.gradients)
        known = self._variance_at(self.probes.gradients, *found[1], final=final)
        if known is None:
            return None
        measured = MeasuredAccuracy.of((earlier, self.ranks[-1]), found, *known, self.probes.training)
        return replace(measured, round_off=self._round_off(bounds.space))

    def _chosen_probes(self) -> ProbeRows:
        """Return the probes, with the fresh ones if these are wanted."""
        with self.objective.network.pass_counter.phase("probes"):
            first = ProbeRows.of(self.objective, _N_PROBES, self.solver.seed)
            if not self.fresh:
                return first
            return first.followed_by(ProbeRows.of(self.objective, _N_FRESH_PROBES, self.solver.seed + 1))

    def _variance_at(
        self, gradients: Tensor, lower: Tensor, upper: Tensor, *, final: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Return the variance at the probes and its relative uncertainty, (m,) each; None if it is too early.

        Args:
            gradients: those of the probes, (m, P).
            lower: lower bound of the variance, (m,).
            upper: upper bound, (m,).
            final: whether the space cannot grow further.
        """
        gap, rtol = 2 * (upper - lower) / (upper + lower), self.solver.rtol
        if not len(gap):  # every gradient was 0
            return lower, gap
        middle, half = 0.5 * (lower + upper), 0.5 * gap
        unsolved = gradients[len(self.known[0]) :]
        if len(unsolved) and float(gap.max()) <= _KNOWN * rtol:  # the bounds are enough
            return middle, half
        if len(unsolved):
            rank, max_rank = self.cycle.rank, self.max_rank
            is_far = float(gap.mean()) > _GAP_PER_RTOL * rtol and not final and not self._has_last_room()
            if is_far and rank < self.solved_from:
                return None
            if is_far:
                max_rank = min(max_rank, rank + max(rank // 2, _USUAL_ITERATIONS * len(unsolved)))
            with self.objective.network.pass_counter.phase("probes"):
                solved = variance_of_gradients(
                    self.cycle, self.coordinates.whiten_rhs(unsolved), tolerance=_KNOWN * rtol, max_rank=max_rank
                )
            if is_far and float(solved[1].square().mean().sqrt()) > _KNOWN * rtol:
                self.solved_from = math.ceil(_GROWTH_PER_ATTEMPT * rank)
                return None
            self.known = (self.known[0] + solved[0].tolist(), self.known[1] + solved[1].tolist())
        variance, uncertainty = (torch.tensor(values).to(lower) for values in self.known)
        narrow = half < uncertainty  # the space has outgrown the solution
        return torch.where(narrow, middle, variance), torch.where(narrow, half, uncertainty)

    def _has_last_room(self) -> bool:
        """Return whether the space has reached a size at which it must leave room to solve for the probes."""
        return 0 <= self._room() < _PROBE_VECTORS

    def _room(self) -> float:
        """Return how many more vectors the space may have; unlimited if it may span all of θ."""
        if self.max_rank == self.objective.theta.numel():
            return math.inf
        return self.max_rank - self.cycle.rank - len(self.cycle.block)

    def _round_off(self, space: KrylovSpace) -> float:
        """Return the relative error that round-off in float64 may cause at rows other than the probes."""
        if self.objective.theta.dtype != torch.float64 or self.coordinates.unit <= 0:
            return 0.0
        return round_off(float(space.largest))

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
